"""scale/models.py: a whole pipeline comes back as it was saved; anything else is refused with what to do."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from transformers import CLIPConfig, CLIPImageProcessorPil

from scale.make_tiny_sd import WORDS, unet, untrained
from scale.models import companions, load


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The embedded model's parts, untrained."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("models") / "whole"
    untrained().to(torch.float16).save_pretrained(path)
    return path


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def edit(file: Path, **changes) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_weights_come_in_float32_and_without_a_safety_checker(whole):
    pipeline = load(str(whole))
    assert {part.dtype for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder)} == {torch.float32}
    assert pipeline.safety_checker is None


def test_each_word_of_a_caption_is_one_token(whole):
    """Through the files: transformers reads the tokenizer that was written."""
    words = load(str(whole)).tokenizer
    assert words.model_max_length == 16
    for word in WORDS:
        start, _, end = words(word).input_ids
        assert (start, end) == (words.bos_token_id, words.eos_token_id) == (0, 1)
    assert len(words("fox").input_ids) == 5
    assert words.decode(words("a red circle").input_ids, skip_special_tokens=True).strip() == "a red circle"


@pytest.mark.parametrize("part", ["tokenizer", "unet"])
def test_a_folder_that_lacks_a_part(folder, part):
    """diffusers itself loads one without a tokenizer's files."""
    shutil.rmtree(folder / part)
    with pytest.raises(ValueError, match=f"lacks {part}"):
        load(str(folder))


def test_a_safety_checker_comes_in_a_variant_too(folder):
    """Which the model may have alone; beside a model in float32 it is in float32."""
    towers = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config=towers, vision_config={**towers, "image_size": 24, "patch_size": 8}, projection_dim=16
    )
    own = {"safety_checker": StableDiffusionSafetyChecker(config), "feature_extractor": CLIPImageProcessorPil()}
    pipeline = load(str(folder))
    whole = StableDiffusionPipeline(**{**pipeline.components, **own}).to(torch.float16)
    whole.save_pretrained(folder.parent / "variant", variant="fp16")
    found = companions(pipeline, str(folder.parent / "variant"), variant="fp16")
    held, made = (part.state_dict() for part in (found["safety_checker"], whole.safety_checker))
    assert all(v.dtype == torch.float32 and torch.equal(v, made[k].float()) for k, v in held.items())
    assert found["feature_extractor"].to_dict() == own["feature_extractor"].to_dict()
    assert companions(pipeline, str(folder)) == {}


def test_a_part_that_lacks_a_file(folder):
    (folder / "unet" / "diffusion_pytorch_model.safetensors").rename(folder / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match=r"is not whole.*safetensors are needed"):
        load(str(folder))


def test_what_is_no_folder_of_diffusers(tmp_path):
    with pytest.raises(ValueError, match=r"has no model_index\.json"):
        load(str(tmp_path))
    (tmp_path / "model.ckpt").touch()
    with pytest.raises(ValueError, match="must be converted"):
        load(str(tmp_path / "model.ckpt"))


def test_a_pipeline_of_another_kind(folder):
    edit(folder / "model_index.json", _class_name="StableDiffusionXLPipeline")
    with pytest.raises(ValueError, match="is a StableDiffusionXLPipeline"):
        load(str(folder))


def test_an_inpainting_unet(folder):
    edit(folder / "vae" / "config.json", latent_channels=4)
    unet(9).save_pretrained(folder / "unet")
    with pytest.raises(ValueError, match="takes 9 channels where its VAE makes 4"):
        load(str(folder))


def test_an_unknown_prediction(folder):
    edit(folder / "scheduler" / "scheduler_config.json", prediction_type="sample")
    with pytest.raises(ValueError, match="predicts 'sample'"):
        load(str(folder))


def test_a_variant_that_is_not_there(whole):
    with pytest.raises(ValueError, match=r"variant 'fp16': .* leave variant out"):
        load(str(whole), variant="fp16")


@pytest.mark.parametrize("name", ["nobody/no-such-model", "not there"])
def test_a_name_that_cannot_be_had(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=f"model: {name} cannot be had .*hf download"):
        load(name)
