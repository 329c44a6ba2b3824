"""Rewards give the numbers that the tools they stand on give."""

import io
import math
import shutil
import sys
from functools import reduce

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
)

from scale import aesthetic, shapes
from scale.prompts import Prompt
from scale.recipes.make_tiny_sd import tokenizer
from scale.rewards import ClipScore, Elsewhere, Weighted, ask, built_in, has_gradient, kilobytes, names_of, reward_of

PROMPTS = ["a red circle on a white ground", "a blue square on a black ground", "a yellow cross on a grey ground"]


@pytest.fixture
def pictures():
    return shapes.render([shapes.parse(prompt) for prompt in PROMPTS], torch.Generator().manual_seed(0)).float()


def none(pictures):
    return [{}] * len(pictures)


# the file


def test_a_picture_weighs_what_its_file_weighs(pictures):
    noisy = torch.cat([pictures, torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))]).float()
    expected = []
    for picture in noisy:
        file = io.BytesIO()
        pixels = np.asarray(picture.permute(1, 2, 0).mul(255).round(), dtype=np.uint8)
        Image.fromarray(pixels).save(file, "jpeg", quality=95)
        expected.append(len(file.getvalue()) / 1000)
    assert kilobytes(noisy).tolist() == pytest.approx(expected)
    assert expected[3] > max(expected[:3])
    small, large = (reward_of(f"jpeg-{name}compressibility")(noisy, [], []) for name in ("", "in"))
    assert torch.equal(small, -large) and torch.equal(large, kilobytes(noisy))


# picture and prompt


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    """A random CLIP in the file format of the real ones."""
    folder, words = tmp_path_factory.mktemp("clip"), tokenizer()
    tower = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**tower, "vocab_size": len(words), "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 1}
    vision = {**tower, "image_size": 24, "patch_size": 8}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16, logit_scale_init_value=2.0))
    model.float().save_pretrained(folder)
    words.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size=24).save_pretrained(folder)
    return str(folder)


def smooth(n, height, width):
    """Images of 8 bits, (n, 3, height, width), and the same in PIL."""
    low = torch.rand(n, 3, 5, 5, generator=torch.Generator().manual_seed(2)).float()
    images = torch.nn.functional.interpolate(low, size=(height, width), mode="bicubic").clamp(0, 1) * 0.9 + 0.05
    pixels = (images * 255).round()
    return pixels / 255, [Image.fromarray(np.asarray(p.permute(1, 2, 0), dtype=np.uint8)) for p in pixels]


SIZES = [(24, 24), (32, 48), (60, 40), (32, 45), (45, 32)]
ROUNDED = 1.5 / 255 / min(aesthetic.STD)
"""How far images are apart that were rounded to 8 bits after they were resized, and that were not."""


@pytest.mark.parametrize("height, width", SIZES)
def test_clip_score_is_transformers_own(clip, height, width):
    """By the processor of transformers, which rounds to 8 bits after it has resized: a pixel is off by at most 1/255
    before it is divided by CLIP's standard deviation."""
    images, pil = smooth(3, height, width)
    score = ClipScore(clip)
    prepared = CLIPImageProcessorPil.from_pretrained(clip)(pil, return_tensors="pt").pixel_values
    assert float((score.prepared(images) - prepared).abs().max()) < ROUNDED
    model, words = CLIPModel.from_pretrained(clip), CLIPTokenizer.from_pretrained(clip)
    read = words(PROMPTS, padding="max_length", max_length=16, return_tensors="pt")
    with torch.no_grad():
        logits = model(pixel_values=score.prepared(images), **read).logits_per_image.diagonal()
    temperature = float(model.logit_scale.detach().exp())
    torch.testing.assert_close(score(images, PROMPTS, none(images)) * temperature, logits, rtol=1e-5, atol=1e-5)
    scaled = reward_of(f"pickscore={clip}")(images, PROMPTS, none(images))
    torch.testing.assert_close(scaled, logits, rtol=1e-5, atol=1e-5)


def test_clip_score_has_a_gradient_in_the_picture_alone(clip, pictures):
    score = reward_of(f"clip-score={clip}")
    pictures.requires_grad_()
    score(pictures, PROMPTS, none(pictures)).sum().backward()
    assert float(pictures.grad.abs().max()) > 0
    assert all(p.grad is None for p in score.parameters())


# what people like


def randomised(model):
    """All weights random, biases and normalisations too."""
    rng = torch.Generator().manual_seed(3)
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.copy_(0.3 * torch.randn(value.shape, generator=rng))
    return model.float().eval()


LAYERS = {0: (1024, None), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}


def head_of(width):
    """The weights of a head, as the published files name them."""
    rng, kept = torch.Generator().manual_seed(4), {}
    for i, (out, into) in LAYERS.items():
        spread = 2 / (into or width) ** 0.5
        kept[f"layers.{i}.weight"] = spread * torch.randn(out, into or width, generator=rng, dtype=torch.float32)
        kept[f"layers.{i}.bias"] = torch.randn(out, generator=rng, dtype=torch.float32)
    return kept


def headed(x, head):
    """(n, width) -> (n,)."""
    for i in LAYERS:
        x = x @ head[f"layers.{i}.weight"].T + head[f"layers.{i}.bias"]
    return x[:, 0]


@pytest.fixture(scope="module")
def aesthetic_folder(clip, tmp_path_factory) -> str:
    """A CLIP with the head beside it."""
    folder = tmp_path_factory.mktemp("aesthetic") / "model"
    shutil.copytree(clip, folder)
    torch.save(head_of(16), folder / "aesthetic-model.pth")
    return str(folder)


def assert_cropped(reward, images):
    """Images of another size are prepared as CLIP's are."""
    found = reward(images, PROMPTS, none(images))
    torch.testing.assert_close(found, reward(aesthetic.crop(images, 24), PROMPTS, none(images)))


def test_the_aesthetic_predictor_is_a_head_on_the_normalised_embedding(clip, aesthetic_folder):
    images, pil = smooth(3, 24, 24)
    pixels = CLIPImageProcessorPil.from_pretrained(clip)(pil, return_tensors="pt").pixel_values
    model = CLIPModel.from_pretrained(clip)
    with torch.no_grad():
        seen = model.visual_projection(model.vision_model(pixels).pooler_output)
    expected = headed(seen / seen.square().sum(1, keepdim=True).sqrt(), head_of(16))
    reward = reward_of(f"aesthetic={aesthetic_folder}")
    torch.testing.assert_close(reward(images, PROMPTS, none(images)), expected, rtol=1e-5, atol=1e-4)
    assert float(expected.std()) > 0.1
    assert_cropped(reward, smooth(3, 32, 45)[0])


def test_the_head_of_the_aesthetic_predictor_may_be_a_file(clip, aesthetic_folder, tmp_path, pictures, monkeypatch):
    expected = reward_of(f"aesthetic={aesthetic_folder}")(pictures, PROMPTS, none(pictures))
    monkeypatch.setattr(aesthetic, "CLIP", clip)
    save_file(head_of(16), tmp_path / "aesthetic-model.safetensors")
    for model in (tmp_path, tmp_path / "aesthetic-model.safetensors", f"{aesthetic_folder}/aesthetic-model.pth"):
        torch.testing.assert_close(reward_of(f"aesthetic={model}")(pictures, PROMPTS, none(pictures)), expected)


def to_open_clip(state):
    """The weights of a CLIPModel as OpenCLIP names them."""
    kept = {
        "logit_scale": state["logit_scale"], "visual.proj": state["visual_projection.weight"].T,
        "text_projection": state["text_projection.weight"].T,
        "visual.class_embedding": state["vision_model.embeddings.class_embedding"],
        "visual.conv1.weight": state["vision_model.embeddings.patch_embedding.weight"],
        "visual.positional_embedding": state["vision_model.embeddings.position_embedding.weight"],
        "token_embedding.weight": state["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": state["text_model.embeddings.position_embedding.weight"],
    }  # fmt: skip
    for kind in ("weight", "bias"):
        kept[f"visual.ln_pre.{kind}"] = state[f"vision_model.pre_layrnorm.{kind}"]
        kept[f"visual.ln_post.{kind}"] = state[f"vision_model.post_layernorm.{kind}"]
        kept[f"ln_final.{kind}"] = state[f"text_model.final_layer_norm.{kind}"]
        for ours, theirs, layers in (("text_model", "", 3), ("vision_model", "visual.", 2)):
            for i in range(layers):
                layer, block = f"{ours}.encoder.layers.{i}", f"{theirs}transformer.resblocks.{i}"
                attention = [state[f"{layer}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
                kept[f"{block}.attn.in_proj_{kind}"] = torch.cat(attention)
                kept[f"{block}.attn.out_proj.{kind}"] = state[f"{layer}.self_attn.out_proj.{kind}"]
                kept[f"{block}.ln_1.{kind}"] = state[f"{layer}.layer_norm1.{kind}"]
                kept[f"{block}.ln_2.{kind}"] = state[f"{layer}.layer_norm2.{kind}"]
                kept[f"{block}.mlp.c_fc.{kind}"] = state[f"{layer}.mlp.fc1.{kind}"]
                kept[f"{block}.mlp.c_proj.{kind}"] = state[f"{layer}.mlp.fc2.{kind}"]
    return kept


@pytest.fixture(scope="module")
def hps(tmp_path_factory):
    """A small random model of ViT-H/14's kind, and the folder of its OpenCLIP checkpoint."""
    folder, words = tmp_path_factory.mktemp("hps"), tokenizer()
    same = {"num_attention_heads": 16, "hidden_act": "gelu"}
    text = {
        **same, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "vocab_size": len(words),
        "max_position_embeddings": 16, "bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id,
    }  # fmt: skip
    vision = {
        **same, "hidden_size": 48, "intermediate_size": 36, "num_hidden_layers": 2, "image_size": 24, "patch_size": 8,
    }  # fmt: skip
    model = randomised(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=20)))
    kept = {"epoch": 1, "state_dict": to_open_clip(model.state_dict())}
    torch.save(kept, folder / "HPS_v2_compressed.pt")
    words.save_pretrained(folder)
    return model, folder


def test_an_open_clip_checkpoint_becomes_the_same_model(hps):
    model, folder = hps
    found = aesthetic.from_open_clip(str(folder / "HPS_v2_compressed.pt"), tokenizer())
    assert found.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(found.state_dict()[key], value) for key, value in model.state_dict().items())
    for part in ("text_config", "vision_config"):
        ours, theirs = (getattr(clip.config, part).to_dict() for clip in (found, model))
        assert ours == theirs
    back = to_open_clip(found.state_dict())
    kept = torch.load(folder / "HPS_v2_compressed.pt")["state_dict"]
    assert back.keys() == kept.keys() and all(torch.equal(back[key], value) for key, value in kept.items())


def on_black(image, size):
    """Its longer side resized to `size`, in the middle of a black square."""
    sides = [round(side * size / max(image.size)) for side in image.size]
    square = Image.new("RGB", (size, size))
    square.paste(image.resize(sides, Image.Resampling.BICUBIC), [(size - side) // 2 for side in sides])
    return square


@pytest.mark.parametrize("height, width", SIZES)
def test_hps_is_the_cosine_of_whole_images(hps, height, width):
    model, folder = hps
    images, pil = smooth(3, height, width)
    score = reward_of(f"hpsv2={folder / 'HPS_v2_compressed.pt'}")
    processor = CLIPImageProcessorPil(do_resize=False, do_center_crop=False)
    prepared = processor([on_black(image, 24) for image in pil], return_tensors="pt").pixel_values
    assert float((score.prepared(images) - prepared).abs().max()) < ROUNDED
    read = tokenizer()(PROMPTS, padding="max_length", max_length=16, return_tensors="pt")
    with torch.no_grad():
        out = model(pixel_values=score.prepared(images), **read)
    expected = (out.image_embeds * out.text_embeds).sum(1)
    torch.testing.assert_close(score(images, PROMPTS, none(images)), expected, rtol=1e-5, atol=1e-5)
    assert float(expected.std()) > 1e-3


def test_hps_is_found_by_its_name_and_in_the_format_of_transformers(hps, tmp_path, pictures):
    model, folder = hps
    expected = reward_of(f"hpsv2={folder / 'HPS_v2_compressed.pt'}")(pictures, PROMPTS, none(pictures))
    newer = tmp_path / "newer"
    shutil.copytree(folder, newer)
    other = {
        key: value * 1.5 if key == "visual.proj" else -value for key, value in to_open_clip(model.state_dict()).items()
    }
    torch.save({"state_dict": other}, newer / "HPS_v2.1_compressed.pt")
    torch.testing.assert_close(reward_of(f"hpsv2={newer}")(pictures, PROMPTS, none(pictures)), expected)
    assert not torch.allclose(reward_of(f"hpsv2.1={newer}")(pictures, PROMPTS, none(pictures)), expected)
    model.save_pretrained(tmp_path / "transformers")
    tokenizer().save_pretrained(tmp_path / "transformers")
    for name in ("hpsv2", "hpsv2.1"):
        found = reward_of(f"{name}={tmp_path / 'transformers'}")(pictures, PROMPTS, none(pictures))
        torch.testing.assert_close(found, expected)


def test_a_model_without_a_tokenizer_takes_that_of_clip(hps, clip, tmp_path, pictures, monkeypatch):
    """Not an empty one, which transformers makes of a folder that has none."""
    _, folder = hps
    expected = reward_of(f"hpsv2={folder}")(pictures, PROMPTS, none(pictures))
    shutil.copy(folder / "HPS_v2_compressed.pt", tmp_path)
    with pytest.raises(ValueError, match=f"no tokenizer in {tmp_path} or openai/clip-vit-large-patch14"):
        reward_of(f"hpsv2={tmp_path}")
    monkeypatch.setattr(aesthetic, "CLIP", clip)
    torch.testing.assert_close(reward_of(f"hpsv2={tmp_path}")(pictures, PROMPTS, none(pictures)), expected)


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "circle", "square", "on", "ground", "##s"]


@pytest.fixture(scope="module")
def image_reward(tmp_path_factory):
    """A small random model with ImageReward's names, and its folder."""
    folder, positions = tmp_path_factory.mktemp("image-reward"), 40
    vision = BlipVisionModel(BlipVisionConfig(
        hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=16, image_size=24, patch_size=8,
    ))  # fmt: skip
    text = BlipTextModel(BlipTextConfig(
        vocab_size=len(WORDS) + 2, hidden_size=24, encoder_hidden_size=32, intermediate_size=36, num_hidden_layers=3,
        num_attention_heads=12, max_position_embeddings=positions, is_decoder=True,
    ), add_pooling_layer=False)  # fmt: skip
    kept = {f"blip.text_encoder.{key}": value for key, value in randomised(text).state_dict().items()}
    kept["blip.text_encoder.embeddings.position_ids"] = torch.arange(positions)[None]
    kept["blip.vision_proj.weight"] = torch.zeros(4, 32)
    kept |= {f"mlp.{key}": value for key, value in head_of(24).items()}
    named = {
        "embeddings.class_embedding": "cls_token", "embeddings.position_embedding": "pos_embed",
        "embeddings.patch_embedding": "patch_embed.proj", "encoder.layers": "blocks", "layer_norm1": "norm1",
        "layer_norm2": "norm2", "self_attn.qkv": "attn.qkv", "self_attn.projection": "attn.proj",
        "post_layernorm": "norm",
    }  # fmt: skip
    for key, value in randomised(vision).state_dict().items():
        theirs = reduce(lambda name, pair: name.replace(*pair), named.items(), key)
        kept[f"blip.visual_encoder.{theirs}"] = value
    torch.save(kept, folder / "ImageReward.pt")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    return kept, folder


class Blip:
    """ImageReward with every sum written out: a ViT that normalises before, and a BERT that normalises after."""

    def __init__(self, state):
        self.state = state

    def linear(self, x, name):
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def norm(self, x, name, eps):
        scale = (x.var(-1, keepdim=True, unbiased=False) + eps).sqrt()
        return (x - x.mean(-1, keepdim=True)) / scale * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]

    @staticmethod
    def attend(q, k, v, heads, mask=0.0):
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        weights = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5 + mask).softmax(-1)
        return (weights @ v).transpose(1, 2).flatten(2)

    def seen(self, pixels):
        n, at = len(pixels), "blip.visual_encoder."
        kernel, bias = self.state[f"{at}patch_embed.proj.weight"], self.state[f"{at}patch_embed.proj.bias"]
        patches = pixels.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).reshape(n, 9, -1)
        x = torch.cat([self.state[f"{at}cls_token"].expand(n, 1, -1), patches @ kernel.flatten(1).T + bias], 1)
        x = x + self.state[f"{at}pos_embed"]
        for block in (f"{at}blocks.{i}." for i in range(2)):
            qkv = self.linear(self.norm(x, f"{block}norm1", 1e-6), f"{block}attn.qkv").chunk(3, -1)
            x = x + self.linear(self.attend(*qkv, heads=16), f"{block}attn.proj")
            inner = self.linear(self.norm(x, f"{block}norm2", 1e-6), f"{block}mlp.fc1")
            x = x + self.linear(torch.nn.functional.gelu(inner), f"{block}mlp.fc2")
        return self.norm(x, f"{at}norm", 1e-6)

    def attended(self, x, other, name, mask=0.0):
        """x attends to the other sequence."""
        qkv = (self.linear(y, f"{name}.self.{k}") for y, k in ((x, "query"), (other, "key"), (other, "value")))
        added = self.linear(self.attend(*qkv, heads=12, mask=mask), f"{name}.output.dense")
        return self.norm(x + added, f"{name}.output.LayerNorm", 1e-12)

    def read(self, ids, seen):
        at = "blip.text_encoder."
        mask = torch.where(ids == 0, -math.inf, 0.0)[:, None, None]
        words, places = (self.state[f"{at}embeddings.{kind}_embeddings.weight"] for kind in ("word", "position"))
        x = self.norm(words[ids] + places[: ids.shape[1]], f"{at}embeddings.LayerNorm", 1e-12)
        for layer in (f"{at}encoder.layer.{i}." for i in range(3)):
            x = self.attended(x, x, f"{layer}attention", mask)
            x = self.attended(x, seen, f"{layer}crossattention")
            inner = torch.nn.functional.gelu(self.linear(x, f"{layer}intermediate.dense"))
            x = self.norm(x + self.linear(inner, f"{layer}output.dense"), f"{layer}output.LayerNorm", 1e-12)
        return x[:, 0]


def test_image_reward_is_the_head_of_a_text_encoder_that_attends_to_the_image(image_reward):
    state, folder = image_reward
    images, pil = smooth(3, 24, 24)
    prompts = ["a red circle on a blue ground", "Blue squares", "a " * 50]
    lines = [[2, 5, 6, 8, 10, 5, 7, 11, 3], [2, 7, 9, 12, 3], [2, *[5] * 33, 3]]
    ids = torch.tensor([line + [0] * (35 - len(line)) for line in lines])
    blip = Blip({key: value.double() if value.is_floating_point() else value for key, value in state.items()})
    processor = CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size=24)
    images = images.double()
    mean, std = (torch.tensor(v)[:, None, None] for v in (processor.image_mean, processor.image_std))
    pixels = (images - mean) / std  # as the processor's, in more digits
    torch.testing.assert_close(pixels.float(), processor(pil, return_tensors="pt").pixel_values, rtol=0, atol=1e-6)
    head = {key.removeprefix("mlp."): value for key, value in blip.state.items() if key.startswith("mlp.")}
    expected = (headed(blip.read(ids, blip.seen(pixels)), head) - 0.16717362830052426) / 1.0333394966054072
    for model in (folder, folder / "ImageReward.pt"):
        reward = reward_of(f"imagereward={model}").double()
        torch.testing.assert_close(reward(images, prompts, none(images)), expected, rtol=1e-9, atol=1e-9)
    assert float(expected.std()) > 0.1
    assert_cropped(reward, smooth(3, 32, 45)[0].double())


@pytest.fixture
def named(request, clip, aesthetic_folder, hps, image_reward):
    """A reward with a small random model, as a user names it."""
    models = {"clip-score": clip, "pickscore": clip, "aesthetic": aesthetic_folder, "hpsv2": hps[1]}
    return f"{request.param}={models.get(request.param, image_reward[1])}"


@pytest.mark.parametrize("height, width", [(20, 20), (26, 34)])
@pytest.mark.parametrize("named", ["clip-score", "pickscore", "aesthetic", "hpsv2", "imagereward"], indirect=True)
def test_gradients_are_finite_differences(named, height, width):
    """Along a random direction, in float64, where the resized images stay clear of 0 and 1."""
    reward = reward_of(named).double()
    assert reward.differentiable and not any(p.requires_grad for p in reward.parameters())
    images = smooth(3, height, width)[0].double() * 0.5 + 0.25
    direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(5))
    moved = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(reward(moved, PROMPTS, none(images)).sum(), moved)
    up, down = (reward(images + h * direction, PROMPTS, none(images)).sum() for h in (1e-5, -1e-5))
    slope = float((gradient * direction).sum())
    assert slope == pytest.approx(float(up - down) / 2e-5, rel=1e-5)
    assert abs(slope) > 1e-4


# what a user writes


def test_rewards_add_up(pictures):
    both = reward_of("following + -0.5 * jpeg-compressibility")(pictures, PROMPTS, none(pictures))
    expected = shapes.following(pictures, PROMPTS) + 0.5 * kilobytes(pictures)
    torch.testing.assert_close(both, expected.to(both))


MODULE = """
import torch

def red(images, prompts, metadata):
    print("a reward may print")
    return images[:, 0].mean((1, 2)) + torch.tensor([float(m.get("bonus", 0)) for m in metadata])

class Length:
    def __call__(self, images, prompts, metadata):
        return torch.tensor([float(len(p)) for p in prompts])

def broken(images, prompts, metadata):
    raise RuntimeError("no such luck")

def gone(images, prompts, metadata):
    import os
    os._exit(3)
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "mine_of_the_test.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return "mine_of_the_test"


@pytest.mark.parametrize("python", [None, sys.executable])
def test_a_users_function_here_and_in_another_interpreter(mine, pictures, python):
    metadata = [{"bonus": 1}, {}, {"bonus": 2.5}]
    found = reward_of(f"{mine}:red + 2 * {mine}:Length", python)(pictures, PROMPTS, metadata)
    expected = pictures[:, 0].mean((1, 2)) + torch.tensor([1, 0, 2.5]) + 2 * torch.tensor([len(p) for p in PROMPTS])
    torch.testing.assert_close(found, expected.to(found))


@pytest.mark.parametrize(
    "rank, visible, seen",
    [("1", None, 1), ("1", "4,6", 6), ("5", "4,6", 6), (None, "4,6", 46), ("1", "", -1), (None, None, -2)],
)
def test_a_worker_sees_the_device_of_its_process(rank, visible, seen, tmp_path, monkeypatch):
    """Of those that the processes themselves may see, as accelerate deals them."""
    (tmp_path / "devices.py").write_text(
        "import os, torch\ngiven = os.environ.get('CUDA_VISIBLE_DEVICES')\n"
        "n = -2 if given is None else int(given.replace(',', '') or -1)\n"
        "def seen(images, prompts, metadata):\n    return torch.full((len(images),), float(n))\n"
    )
    monkeypatch.chdir(tmp_path)
    for name, value in {"LOCAL_RANK": rank, "CUDA_VISIBLE_DEVICES": visible}.items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    assert reward_of("devices:seen", sys.executable)(torch.zeros(2, 3, 4, 4), ["", ""], [{}, {}]).tolist() == [seen] * 2


def test_what_fails_elsewhere_is_told_here(mine, pictures):
    with pytest.raises(RuntimeError, match="no such luck"):
        Elsewhere(sys.executable, f"{mine}:broken")(pictures, PROMPTS, none(pictures))
    with pytest.raises(
        ValueError, match=r"not_there:f cannot be had in reward_python(.|\n)*No module named 'not_there'"
    ):
        reward_of("not_there:f", sys.executable)
    with pytest.raises(RuntimeError, match="ended with exit status 3"):
        Elsewhere(sys.executable, f"{mine}:gone")(pictures, PROMPTS, none(pictures))
    with pytest.raises(ValueError, match="reward_python '/not/there' cannot be run"):
        Elsewhere("/not/there", f"{mine}:red")(pictures, PROMPTS, none(pictures))


@pytest.mark.parametrize(
    "text, message",
    [
        ("beauty", r"a name without a colon \(module:function\) must be one of jpeg-compressibility"),
        ("mine.parts.red", r"must be one of .*, got 'mine.parts.red'; did you mean mine.parts:red\?"),
        ("following - 0.1 * jpeg-compressibility", "must be a number, got 'following - 0.1'; write differences as"),
        ("nan * following", "must be a number, got 'nan'"),
        ("following=/some/model", "has no model to be named"),
        ("not_there:f", "cannot be imported: No module named"),
        ("math:not_there", "cannot be imported: module 'math' has no attribute"),
        ("clip-score=./not_there", "its model cannot be had; name a folder, clip-score=FOLDER"),
        ("aesthetic", "name a folder, aesthetic=FOLDER .*aesthetic-model.pth in trl-lib/ddpo-aesthetic-predictor"),
        ("aesthetic=./not_there", "name a folder, aesthetic=FOLDER"),
        ("hpsv2", "name a folder, hpsv2=FOLDER .*no HPS_v2_compressed.pt in xswu/HPSv2"),
        ("0.5 * hpsv2.1", r"name a folder, hpsv2.1=FOLDER .*no HPS_v2.1_compressed.pt in xswu/HPSv2"),
        ("hpsv2=./not_there", "name a folder, hpsv2=FOLDER"),
        ("imagereward", "ImageReward.pt, imagereward=FOLDER, or .*package image-reward .*as reward_python"),
        ("imagereward=./not_there", "no ImageReward.pt in ./not_there"),
    ],
)
def test_what_cannot_be_had_is_refused(text, message):
    with pytest.raises(ValueError, match=message) as refused:
        reward_of(text)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "named, name, weight",
    [
        ("aesthetic", "aesthetic-model.pth", "layers.6.bias"),
        ("hpsv2", "HPS_v2_compressed.pt", "visual.transformer.resblocks.1.mlp.c_proj.weight"),
        ("imagereward", "ImageReward.pt", "blip.text_encoder.encoder.layer.2.output.dense.bias"),
    ],
    indirect=["named"],
)
def test_a_file_that_is_no_such_model_is_refused(named, name, weight, clip, tmp_path, monkeypatch):
    monkeypatch.setattr(aesthetic, "CLIP", clip)
    reward, folder = named.split("=")
    kept = torch.load(f"{folder}/{name}")
    kept = kept.get("state_dict", kept)
    torch.save({key: value for key, value in kept.items() if key != weight}, tmp_path / "part.pt")
    torch.save({"layers.0.weight": torch.zeros(3, 3)}, tmp_path / "other.pt")
    for content in (b"", b"no weights"):
        (tmp_path / "text.pt").write_bytes(content)
        with pytest.raises(ValueError, match=r"text.pt cannot be read as weights: .{,200}$"):
            reward_of(f"{reward}={tmp_path / 'text.pt'}")
    for file in ("part.pt", "other.pt"):
        with pytest.raises(ValueError, match=rf"{file} (does not have the weights|is no checkpoint of).{{,250}}$"):
            reward_of(f"{reward}={tmp_path / file}")


def test_rewards_are_known_by_their_names():
    text = "0.5 * hpsv2.1 + aesthetic=some/model + -1 * imagereward"
    assert names_of(text) == ["hpsv2.1", "aesthetic", "imagereward"] and built_in(text)
    assert has_gradient(text) and has_gradient("hpsv2", sys.executable)
    assert not has_gradient(text, sys.executable)  # that of the package has none


@pytest.mark.parametrize(
    "answer",
    [
        lambda: [0.5, 2, np.float64(-1)],
        lambda: np.array([0.5, 2, -1]),
        lambda: np.array([-1, 2, 0.5], dtype=np.float32)[::-1],
        lambda: torch.tensor([0.5, 2, -1]),
        lambda: [torch.tensor(0.5), torch.tensor(2.0), torch.tensor(-1.0)],
    ],
)
def test_a_reward_may_return_a_list_an_array_or_a_tensor_and_information(answer, pictures):
    prompts = [Prompt(text) for text in PROMPTS]

    def foreign(images, prompts, metadata):
        return answer()

    def informed(images, prompts, metadata):
        return answer(), {"seen": len(images)}

    for reward in (foreign, informed):
        found = ask(reward, pictures, prompts)
        assert found.dtype.is_floating_point and found.tolist() == [0.5, 2, -1]
        both = Weighted(((2.0, reward), (1.0, foreign)))
        assert ask(both, pictures, prompts).tolist() == [1.5, 6, -3]
    assert ask(lambda *a: [1, 0, 2], pictures, prompts).tolist() == [1, 0, 2]


def test_a_list_of_tensors_keeps_its_gradient(pictures):
    def red(images, prompts, metadata):
        return [image[0].mean() for image in images], None

    red.differentiable = True
    pictures.requires_grad_()
    ask(red, pictures, [Prompt(text) for text in PROMPTS]).sum().backward()
    torch.testing.assert_close(pictures.grad[:, 0], torch.full_like(pictures[:, 0], 1 / 32**2))


@pytest.mark.parametrize(
    "answer, message",
    [
        (lambda n: {}, r"reward foreign must return a tensor of shape \(3,\), one number a picture, got dict"),
        (lambda n: torch.ones(n, 1), r"got \(3, 1\)"),
        (lambda n: [1.0] * (n + 1), r"got \(4,\)"),
        (lambda n: (np.ones((n, 2)), {}), r"got \(3, 2\)"),
        (lambda n: ["good"] * n, "got list"),
        (lambda n: [[1.0], [1.0, 2.0], 1.0], "got list"),
        (lambda n: np.array([{}] * n), "got ndarray"),
        (lambda n: (1.0,) * n, "got tuple"),
        (lambda n: (1.0, {}), "got tuple"),
        (np.arange, "must return floating-point numbers, got torch.int64"),
        (lambda n: ([1.0, math.inf, 1.0], {}), "reward foreign is inf for picture 1 of 3"),
        (lambda n: torch.tensor([1.0, math.nan, 1.0]), "reward foreign is nan for picture 1 of 3, of 'a blue square"),
    ],
)
def test_what_a_reward_says_is_looked_at(answer, message, pictures):
    def foreign(images, prompts, metadata):
        return answer(len(images))

    with pytest.raises(ValueError, match=message):
        ask(foreign, pictures, [Prompt(text) for text in PROMPTS])


def test_a_package_that_is_missing_here_is_looked_for_elsewhere():
    with pytest.raises(ValueError, match=r"cannot be had in reward_python(.|\n)*No module named 'ImageReward'"):
        reward_of("imagereward", sys.executable)
