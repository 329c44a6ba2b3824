"""Rewards give the numbers that the tools they stand on give."""

import io
import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from scale import shapes
from scale.prompts import Prompt
from scale.recipes.make_tiny_sd import tokenizer
from scale.rewards import ClipScore, Elsewhere, ask, kilobytes, reward_of

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


@pytest.mark.parametrize("height, width", [(24, 24), (32, 48), (60, 40)])
def test_clip_score_is_transformers_own(clip, height, width):
    """By the processor of transformers, which rounds to 8 bits after it has resized: a pixel is off by at most 1/255
    before it is divided by CLIP's standard deviation."""
    rng = torch.Generator().manual_seed(2)
    low = torch.rand(3, 3, 5, 5, generator=rng).float()
    images = torch.nn.functional.interpolate(low, size=(height, width), mode="bicubic").clamp(0, 1)
    images = (images * 255).round() / 255
    pil = [Image.fromarray(np.asarray((image.permute(1, 2, 0) * 255).round(), dtype=np.uint8)) for image in images]
    score = ClipScore(clip)
    prepared = CLIPImageProcessorPil.from_pretrained(clip)(pil, return_tensors="pt").pixel_values
    assert float((score.prepared(images) - prepared).abs().max()) < 1.5 / 255 / min(ClipScore.STD)
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
        ("imagereward", "pip install image-reward"),
        ("clip-score=./not_there", "its model cannot be had; name a folder, clip-score=FOLDER"),
    ],
)
def test_what_cannot_be_had_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        reward_of(text)


@pytest.mark.parametrize(
    "answer, message",
    [
        (lambda n: [1.0] * n, r"reward foreign must return a tensor of shape \(3,\), one number a picture, got list"),
        (lambda n: torch.ones(n, 1), r"got \(3, 1\)"),
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
