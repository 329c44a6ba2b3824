"""Models of what people like in an image, read from the files they were published in, differentiable in the images.

    ClipScore    cos(f(image), g(prompt)), of CLIP, PickScore or HPS v2
    Aesthetic    a(f(image) / |f(image)|)
    ImageReward  (a(h(image, prompt)) - mean) / std

    images: (n, 3, H, W) in [0, 1]; prompts: n strings -> (n,)

f and g are CLIP's embeddings (Radford et al. 2021, arXiv 2103.00020), h is the first output of a text encoder that
attends to the image (BLIP, Li et al. 2022, arXiv 2201.12086), and a is an affine head. Weights are used in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    BertTokenizer,
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
)
from transformers.utils import cached_file

Fit = Callable[[Tensor, int], Tensor]
State = Mapping[str, Tensor]
M = TypeVar("M", bound=nn.Module)

CLIP = "openai/clip-vit-large-patch14"
BERT = "google-bert/bert-base-uncased"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of CLIP's training data, by channel. BLIP takes the same."""


# ------------------------------------------------------------------------------------------ images


def crop(images: Tensor, size: int) -> Tensor:
    """(n, 3, H, W) -> (n, 3, size, size), as CLIPImageProcessor does it: the shorter side is resized to `size`
    (bicubic, antialiased), and the middle is cut out."""
    height, width = (size * n // min(images.shape[2:]) for n in images.shape[2:])
    resized = _resize(images, height, width).clamp(0, 1)
    top, left = (height - size) // 2, (width - size) // 2
    return resized[:, :, top : top + size, left : left + size]


def pad(images: Tensor, size: int) -> Tensor:
    """(n, 3, H, W) -> (n, 3, size, size), as HPS v2 does it: the longer side is resized to `size` (bicubic,
    antialiased), and the rest is black."""
    height, width = (round(n * size / max(images.shape[2:])) for n in images.shape[2:])
    top, left = (size - height) // 2, (size - width) // 2
    return nn.functional.pad(_resize(images, height, width), (left, size - width - left, top, size - height - top))


def _resize(images: Tensor, height: int, width: int) -> Tensor:
    return nn.functional.interpolate(images, size=(height, width), mode="bicubic", antialias=True)


def normalise(images: Tensor) -> Tensor:
    """(images - MEAN) / STD."""
    mean, std = (images.new_tensor(v)[:, None, None] for v in (MEAN, STD))
    return (images - mean) / std


# ------------------------------------------------------------------------------------------ files


def find(model: str, *names: str) -> str:
    """Path of the model's file: the model itself if it is one, else the first of these names that its folder has, or
    the last of them in its repository."""
    for path in (Path(model), *(Path(model, name) for name in names)):
        if path.is_file():
            return str(path)
    try:
        return cached_file(model, names[-1])
    except OSError as wrong:
        raise OSError(f"no {' or '.join(names)} in {model}: {_line(wrong)}") from wrong


def read(file: str) -> State:
    """Tensors by name, of a safetensors file or of one by torch.save: a state dict, or a checkpoint that has one."""
    try:
        if file.endswith(".safetensors"):
            return load_file(file)
        kept = torch.load(file, map_location="cpu", weights_only=True)
        return dict(kept.get("state_dict", kept))
    except OSError:
        raise
    except Exception as wrong:
        raise ValueError(f"{file} cannot be read as weights: {_line(wrong)}") from wrong


def _line(wrong: Exception) -> str:
    return " ".join(str(wrong).split())[:200]


def read_tokenizer(kind: Any, *models: str) -> Any:
    """The tokenizer of the first of these models that has one."""
    for model in models:
        for name in ("tokenizer.json", kind.vocab_files_names["vocab_file"]):
            try:
                cached_file(model, name)
            except OSError as wrong:  # from_pretrained would return an empty one
                missing = wrong
            else:
                return kind.from_pretrained(model)
    raise OSError(f"no tokenizer in {' or '.join(models)}: {_line(missing)}")


def build(make: Callable[[], M], state: State, file: str) -> M:
    """A module with these weights, which may be more than it has; it is not trained any more."""
    with init_empty_weights():
        module = make()
    try:
        module.load_state_dict({key: state[key] for key in module.state_dict() if key in state}, assign=True)
    except RuntimeError as wrong:
        raise ValueError(f"{file} does not have the weights that it should: {_line(wrong)}") from wrong
    return module.float().eval().requires_grad_(False)


def rename(state: State, names: tuple[tuple[str, str], ...]) -> dict[str, Tensor]:
    """The same tensors; in their names each left side becomes its right side, in turn."""
    return {reduce(lambda key, pair: key.replace(*pair), names, key): value for key, value in state.items()}


def select(state: State, prefix: str) -> dict[str, Tensor]:
    """Those whose names begin with the prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def count_layers(state: State, prefix: str, last: str) -> int:
    """Number of names that begin and end so: of one weight that each layer has."""
    return sum(key.startswith(prefix) and key.endswith(last) for key in state)


def make_head(width: int) -> nn.Sequential:
    """The affine head of the aesthetic predictor and of ImageReward, (n, width) -> (n, 1): five linear layers without
    an activation in between. The dropout, which is off, gives them the numbers that they have in the files."""
    return nn.Sequential(
        nn.Linear(width, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2), nn.Linear(128, 64),
        nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------ CLIP


OPEN_CLIP = (
    ("visual.transformer.resblocks.", "vision_model.encoder.layers."),
    ("transformer.resblocks.", "text_model.encoder.layers."),
    ("visual.class_embedding", "vision_model.embeddings.class_embedding"),
    ("visual.conv1.", "vision_model.embeddings.patch_embedding."),
    ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    ("visual.ln_pre.", "vision_model.pre_layrnorm."), ("visual.ln_post.", "vision_model.post_layernorm."),
    ("visual.proj", "visual_projection.weight"),
    ("token_embedding.", "text_model.embeddings.token_embedding."),
    ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    ("ln_final.", "text_model.final_layer_norm."), ("text_projection", "text_projection.weight"),
    (".ln_1.", ".layer_norm1."), (".ln_2.", ".layer_norm2."), (".mlp.c_fc.", ".mlp.fc1."),
    (".mlp.c_proj.", ".mlp.fc2."), (".attn.", ".self_attn."),
)  # fmt: skip
"""Names of OpenCLIP's weights, and those of transformers."""


def from_open_clip(file: str, tokenizer: CLIPTokenizer) -> CLIPModel:
    """The CLIPModel of an OpenCLIP ViT-H/14's checkpoint, of any size: with 16 heads in both encoders, and gelu."""
    state = read(file)
    try:
        sizes = _clip_sizes(state)
    except KeyError as missing:
        raise ValueError(f"{file} is no checkpoint of OpenCLIP's ViT-H/14: it has no {missing}") from missing
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    same = {"num_attention_heads": 16, "hidden_act": "gelu"}
    text, vision = {**same, **ends, **sizes["text"]}, {**same, **sizes["vision"]}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=state["text_projection"].shape[1])
    return build(lambda: CLIPModel(config), convert_open_clip(state), file)


def _clip_sizes(state: State) -> dict[str, dict[str, int]]:
    positions, width = state["positional_embedding"].shape
    patches, visual = state["visual.positional_embedding"].shape
    patch = state["visual.conv1.weight"].shape[-1]
    text = {
        "vocab_size": state["token_embedding.weight"].shape[0], "max_position_embeddings": positions,
        "hidden_size": width, "intermediate_size": state["transformer.resblocks.0.mlp.c_fc.bias"].shape[0],
        "num_hidden_layers": count_layers(state, "transformer.", ".ln_1.bias"),
    }  # fmt: skip
    vision = {
        "patch_size": patch, "image_size": patch * math.isqrt(patches - 1),
        "hidden_size": visual, "intermediate_size": state["visual.transformer.resblocks.0.mlp.c_fc.bias"].shape[0],
        "num_hidden_layers": count_layers(state, "visual.transformer.", ".ln_1.bias"),
    }  # fmt: skip
    return {"text": text, "vision": vision}


def convert_open_clip(state: State) -> dict[str, Tensor]:
    """OpenCLIP's weights under the names of transformers, which has queries, keys and values apart and transposes the
    projections."""
    parts = {}
    for key, value in state.items():
        if ".attn.in_proj_" in key:
            names = (key.replace("in_proj_", f"{letter}_proj.") for letter in "qkv")
            parts.update(zip(names, value.chunk(3), strict=True))
        else:
            parts[key] = value.T.contiguous() if key in ("visual.proj", "text_projection") else value
    return rename(parts, OPEN_CLIP)


class ClipScore(nn.Module):
    """Cosine between image and prompt in a CLIP model; times its temperature for PickScore.

    Args:
        model: name or folder of a CLIP as transformers saves it, or a checkpoint of OpenCLIP's ViT-H/14. One without a
            tokenizer takes CLIP's.
        scaled: whether the cosine is multiplied by the temperature.
        fit: makes squares of the images.
    """

    differentiable = True

    def __init__(self, model: str, scaled: bool = False, fit: Fit = crop) -> None:
        super().__init__()
        if Path(model).is_file():
            self.tokenizer = read_tokenizer(CLIPTokenizer, str(Path(model).parent), CLIP)
            self.clip = from_open_clip(model, self.tokenizer)
        else:
            self.clip = read_clip(model)
            self.tokenizer = read_tokenizer(CLIPTokenizer, model, CLIP)
        self.size, self.scaled, self.fit = self.clip.config.vision_config.image_size, scaled, fit
        self.length = self.clip.config.text_config.max_position_embeddings

    def forward(self, images: Tensor, prompts: list[str], metadata: Any) -> Tensor:
        self.clip.to(images.device)
        seen = self.clip.vision_model(self.prepared(images)).pooler_output
        options: dict[str, Any] = {"padding": "max_length", "max_length": self.length, "truncation": True}
        words = self.tokenizer(prompts, return_tensors="pt", **options).to(images.device)
        text = self.clip.text_model(**words).pooler_output
        pair = self.clip.visual_projection(seen), self.clip.text_projection(text)
        cosine = torch.cosine_similarity(*pair, dim=1)
        return cosine * self.clip.logit_scale.exp() if self.scaled else cosine

    def prepared(self, images: Tensor) -> Tensor:
        """(n, 3, H, W) in [0, 1] -> (n, 3, size, size)."""
        return normalise(self.fit(images, self.size))


def read_clip(model: str) -> CLIPModel:
    """A CLIP as transformers saves it; it is not trained any more."""
    try:
        return CLIPModel.from_pretrained(model, use_safetensors=True).float().eval().requires_grad_(False)
    except OSError as wrong:
        raise OSError(f"no CLIP model in {model}: {_line(wrong)}") from wrong


def read_hps(model: str | None, name: str) -> ClipScore:
    """HPS v2 (Wu et al. 2023, arXiv 2306.09341): the cosine in an OpenCLIP ViT-H/14 tuned on people's choices, of
    images padded to squares.

    Args:
        model: its checkpoint, a folder with that, or a CLIP as transformers saves it; None is the published one.
        name: the checkpoint's published name.
    """
    if model is None or Path(model).is_file() or Path(model, name).is_file():
        model = find(model or "xswu/HPSv2", name)
    return ClipScore(model, fit=pad)


# ------------------------------------------------------------------------------------------ aesthetic


class Aesthetic(nn.Module):
    """LAION's aesthetic predictor, version 2 (improved-aesthetic-predictor, sac+logos+ava1-l14-linearMSE): about 1 to
    10, of the image alone.

    Args:
        model: the head, a file, on top of CLIP's ViT-L/14; or a folder with it, named aesthetic-model.safetensors or
            .pth, on top of the CLIP model in the folder if there is one; or a repository with aesthetic-model.pth.
    """

    differentiable = True

    def __init__(self, model: str = "trl-lib/ddpo-aesthetic-predictor") -> None:
        super().__init__()
        file = find(model, "aesthetic-model.safetensors", "aesthetic-model.pth")
        clip = read_clip(model if Path(model, "config.json").is_file() else CLIP)
        self.vision, self.projection = clip.vision_model, clip.visual_projection
        self.size, width = clip.config.vision_config.image_size, clip.config.projection_dim
        self.head = build(lambda: make_head(width), select(read(file), "layers."), file)

    def forward(self, images: Tensor, prompts: list[str], metadata: Any) -> Tensor:
        self.to(images.device)
        seen = self.projection(self.vision(normalise(crop(images, self.size))).pooler_output)
        return self.head(nn.functional.normalize(seen, dim=1))[:, 0]


# ------------------------------------------------------------------------------------------ ImageReward


BLIP = (
    ("cls_token", "embeddings.class_embedding"), ("pos_embed", "embeddings.position_embedding"),
    ("patch_embed.proj.", "embeddings.patch_embedding."), ("blocks.", "encoder.layers."), (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."), (".attn.proj.", ".self_attn.projection."), (".attn.", ".self_attn."),
    ("norm.weight", "post_layernorm.weight"), ("norm.bias", "post_layernorm.bias"),
)  # fmt: skip
"""Names of the weights of BLIP's image encoder, and those of transformers."""


class ImageReward(nn.Module):
    """Xu et al. 2023, arXiv 2304.05977, in transformers' BLIP. On small random weights it gives the numbers of the
    package image-reward, to the bit.

    Args:
        model: ImageReward.pt, or a folder or repository with it. A tokenizer beside it is taken, else that of BERT.
    """

    differentiable = True
    MEAN, STD = 0.16717362830052426, 1.0333394966054072
    LENGTH = 35
    """Tokens of a prompt."""

    def __init__(self, model: str = "THUDM/ImageReward") -> None:
        super().__init__()
        file = find(model, "ImageReward.pt")
        state = read(file)
        seen, text = select(state, "blip.visual_encoder."), select(state, "blip.text_encoder.")
        try:
            vision_config, text_config = _blip_vision(seen), _blip_text(text)
        except KeyError as missing:
            raise ValueError(f"{file} is no checkpoint of ImageReward: it has no {missing}") from missing
        self.vision = build(lambda: BlipVisionModel(vision_config), rename(seen, BLIP), file)
        self.text = build(lambda: BlipTextModel(text_config, add_pooling_layer=False), text, file)
        self.head = build(lambda: make_head(text_config.hidden_size), select(state, "mlp.layers."), file)
        self.tokenizer = read_tokenizer(BertTokenizer, str(Path(file).parent), BERT)

    def forward(self, images: Tensor, prompts: list[str], metadata: Any) -> Tensor:
        self.to(images.device)
        seen = self.vision(normalise(crop(images, self.vision.config.image_size))).last_hidden_state
        options: dict[str, Any] = {"padding": "max_length", "max_length": self.LENGTH, "truncation": True}
        words = self.tokenizer(prompts, return_tensors="pt", **options).to(images.device)
        h = self.text(words.input_ids, attention_mask=words.attention_mask, encoder_hidden_states=seen)
        return (self.head(h.last_hidden_state[:, 0])[:, 0] - self.MEAN) / self.STD


def _blip_vision(state: State) -> BlipVisionConfig:
    """As ViT-L/16: 16 heads; the sizes are read off the weights."""
    width, _, _, patch = state["patch_embed.proj.weight"].shape
    return BlipVisionConfig(
        hidden_size=width, intermediate_size=state["blocks.0.mlp.fc1.bias"].shape[0], num_attention_heads=16,
        num_hidden_layers=count_layers(state, "blocks.", ".norm1.bias"), patch_size=patch,
        image_size=patch * math.isqrt(state["pos_embed"].shape[1] - 1), hidden_act="gelu", layer_norm_eps=1e-6,
    )  # fmt: skip


def _blip_text(state: State) -> BlipTextConfig:
    """As BERT's base model with attention to an image in each layer: 12 heads; the sizes are read off the weights."""
    words, width = state["embeddings.word_embeddings.weight"].shape
    return BlipTextConfig(
        vocab_size=words, hidden_size=width, num_attention_heads=12, hidden_act="gelu", layer_norm_eps=1e-12,
        intermediate_size=state["encoder.layer.0.intermediate.dense.bias"].shape[0],
        encoder_hidden_size=state["encoder.layer.0.crossattention.self.key.weight"].shape[1],
        num_hidden_layers=count_layers(state, "encoder.layer.", ".intermediate.dense.bias"),
        max_position_embeddings=state["embeddings.position_embeddings.weight"].shape[0], is_decoder=True,
    )  # fmt: skip
