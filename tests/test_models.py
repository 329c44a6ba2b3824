"""scale/models.py: a whole pipeline comes back as it was saved; anything else is refused with what to do."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from transformers import CLIPConfig, CLIPImageProcessorPil

from scale.models import companions, load, outline
from scale.recipes.make_tiny_sd import WORDS, unet, untrained


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
    before = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**before, **changes}))


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
    with pytest.raises(ValueError, match=r"unet has no weights in \.safetensors; .* pickles are not read"):
        load(str(folder))


def test_what_is_no_folder_of_diffusers(tmp_path):
    with pytest.raises(ValueError, match=r"has no model_index\.json"):
        load(str(tmp_path))
    (tmp_path / "model.ckpt").touch()
    with pytest.raises(ValueError, match="must be converted"):
        load(str(tmp_path / "model.ckpt"))


OTHERS = {
    "StableCascadeDecoderPipeline": ("text_encoder", "tokenizer", "decoder", "vqgan"),
    "PixArtAlphaPipeline": ("text_encoder", "tokenizer", "transformer", "vae"),
    "FluxPipeline": ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "transformer", "vae"),
    "StableDiffusionInpaintPipeline": ("text_encoder", "tokenizer", "unet", "vae", "safety_checker"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_pipeline_of_another_kind(tmp_path, kind):
    """It is named, whatever parts it has."""
    for part in ("scheduler", *OTHERS[kind]):
        (tmp_path / part).mkdir()
    edit(tmp_path / "model_index.json", _class_name=kind, transformer=["diffusers", "FluxTransformer2DModel"])
    for work in (load, outline):
        with pytest.raises(ValueError, match=f"must be one of Stable Diffusion 1.x or 2.x, .*; .* is a {kind}"):
            work(str(tmp_path))


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


def test_pickled_weights_alone(folder):
    """As diffusers wrote them once."""
    part = UNet2DConditionModel.from_pretrained(folder / "unet")
    shutil.rmtree(folder / "unet")
    part.save_pretrained(folder / "unet", safe_serialization=False)
    assert [file.name for file in (folder / "unet").glob("*.bin")] == ["diffusion_pytorch_model.bin"]
    for work in (load, outline):
        with pytest.raises(ValueError, match=r"unet has no weights in \.safetensors; .* pickles are not read"):
            work(str(folder))


def test_weights_of_a_variant_alone(whole, tmp_path):
    """In pieces or not; beside others, those without a name serve."""
    pipeline, folder = load(str(whole)), tmp_path / "model"
    pipeline.save_pretrained(folder, variant="fp16")
    pipeline.unet.save_pretrained(folder / "unet", variant="fp16", max_shard_size="500KB")
    (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").unlink()
    assert len(list((folder / "unet").glob("*.safetensors"))) > 1
    for work in (load, outline):
        with pytest.raises(ValueError, match="has weights of variant fp16 alone: pass --variant fp16"):
            work(str(folder))
        with pytest.raises(ValueError, match="has weights of variant fp16 alone"):
            work(str(folder), variant="bf16")
    again = load(str(folder), variant="fp16").unet.state_dict()
    assert all(torch.equal(v, again[k]) for k, v in pipeline.unet.state_dict().items())
    pipeline.vae.save_pretrained(folder / "vae")
    (folder / "vae" / "diffusion_pytorch_model.fp16.safetensors").unlink()
    load(str(folder), variant="fp16")


def test_an_outline_has_no_weights(whole):
    """And the sizes of the pipeline."""
    found, pipeline = outline(str(whole)), load(str(whole))
    assert found.unet.device.type == found.vae.device.type == "meta" and found.widths.pooled == 64
    assert found.unet.num_parameters() == pipeline.unet.num_parameters()
    assert found.unet.config.sample_size == pipeline.unet.config.sample_size
    assert torch.equal(found.scheduler.betas, pipeline.scheduler.betas)


def test_a_part_of_a_class_that_is_not_diffusers(folder):
    """Which would be imported."""
    edit(folder / "model_index.json", vae=["mine", "AutoencoderKL"])
    with pytest.raises(ValueError, match=r"the vae of .* is a mine\.AutoencoderKL, which diffusers does not have"):
        load(str(folder))


def test_a_size_that_is_none(folder):
    edit(folder / "unet" / "config.json", sample_size=None)
    with pytest.raises(ValueError, match="must have a sample_size, a number or two, got None"):
        load(str(folder))


@pytest.mark.parametrize("name", ["nobody/no-such-model", "no-such-model"])
def test_a_name_that_cannot_be_had(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError, match=f"model: there is no folder {name}, and the hub's could not be loaded .*hf download"
    ):
        load(name)


@pytest.mark.parametrize("name", ["./not/there", "/not/there", "~/not", "runs/sd15/pipeline", "not there", "mine/"])
def test_a_path_is_not_looked_for_on_the_hub(name):
    with pytest.raises(ValueError, match=f"^model: there is no folder {name}$"):
        load(name)
