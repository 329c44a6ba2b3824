"""Families of models: each is asked as its own pipeline asks it, trained, saved, and drawn from by diffusers alone."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from test_fit import fresh_engine  # noqa: F401
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel
from transformers.utils import logging

from ctrl import DDIM, Noise, grids, rollout
from ctrl.noising import RectifiedFlow
from scale import models, shapes
from scale.diffusion import Decoded, Prompts, Score, problem
from scale.families import FAMILIES, family_of, network_of
from scale.families.sd3 import CUT, StableDiffusion3
from scale.finetune import Evaluate, Export, add_adapters, dry_run, evaluate_run, export, outline_of, train
from scale.recipes import make_tiny_sd3
from scale.recipes.make_tiny_sd import follows, tokenizer
from scale.requirements import size_of
from scale.sd3 import Settings as SD3Settings
from scale.sdxl import Settings as SDXLSettings
from scale.settings import EMBEDDED

TEXTS = ["a red circle on a white ground", "a large blue square on the left on a grey ground", "a green triangle"]
GUIDANCE = 3.0
CLIP = {"intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 16,
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}  # fmt: skip


def clip(kind: type, width: int, projection: int, words: int) -> torch.nn.Module:
    return kind(CLIPTextConfig(vocab_size=words, hidden_size=width, projection_dim=projection, **CLIP))


def vae(channels: int, **changes: object) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, latent_channels=channels, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, scaling_factor=0.7,
        **changes,
    )  # fmt: skip


def sdxl(zeros: bool = True) -> StableDiffusionXLPipeline:
    """SDXL's classes, with random weights."""
    words = tokenizer()
    unet = UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=8, cross_attention_dim=16 + 24,
        attention_head_dim=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), use_linear_projection=True,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=20 + 6 * 8,
    )  # fmt: skip
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading"
    )
    return StableDiffusionXLPipeline(
        vae(4), clip(CLIPTextModel, 16, 16, len(words)), clip(CLIPTextModelWithProjection, 24, 20, len(words)), words,
        words, unet, scheduler, force_zeros_for_empty_prompt=zeros, add_watermarker=False,
    )  # fmt: skip


def sd3(t5: bool = False) -> StableDiffusion3Pipeline:
    """Stable Diffusion 3's classes, with random weights, and with a T5 or without."""
    words = tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=16, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=48, caption_projection_dim=32, pooled_projection_dim=12 + 20, out_channels=16,
        pos_embed_max_size=8,
    )  # fmt: skip
    encoder = T5EncoderModel(T5Config(vocab_size=len(words), d_model=48, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.1)  # begins at zero, and would predict nothing
    return StableDiffusion3Pipeline(
        transformer, FlowMatchEulerDiscreteScheduler(shift=3.0), vae(16, shift_factor=0.3),
        clip(CLIPTextModelWithProjection, 16, 12, len(words)), words,
        clip(CLIPTextModelWithProjection, 24, 20, len(words)), words, encoder if t5 else None, words if t5 else None,
    )  # fmt: skip


MADE = {"sdxl": sdxl, "sdxl-empty": lambda: sdxl(False), "sd3": sd3, "sd3-t5": lambda: sd3(True)}
SETTINGS = {"sdxl": SDXLSettings, "sd3": SD3Settings}


@pytest.fixture(scope="module", params=MADE)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return kept(request.param, tmp_path_factory.mktemp("families") / request.param)


def kept(name: str, path: Path) -> Path:
    """A pipeline as a folder."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32)
    pipeline = MADE[name]()
    pipeline.save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def float32(float64: None) -> None:
    """As images are drawn."""
    torch.set_default_dtype(torch.float32)
    logging.set_verbosity_error()


def loaded(folder: Path) -> StableDiffusionXLPipeline | StableDiffusion3Pipeline:
    pipeline = models.load(str(folder), t5_tokens=5)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawn(pipeline, start: torch.Tensor, **options) -> torch.Tensor:
    """Latents, by the pipeline's own call."""
    return pipeline(
        TEXTS, guidance_scale=GUIDANCE, latents=start, output_type="latent", **family_of(pipeline).call, **options
    ).images  # fmt: skip


# as diffusers does


def test_without_noise_the_latents_are_the_pipelines_own(folder: Path) -> None:
    """DDIM's steps are those of diffusers' DDIM, and on a rectified flow those of FlowMatchEuler. The ends of the flow
    are moved out to 1 - 1e-3, where the pipeline begins as well, and to 1e-5, which is no further from 0 than the
    velocity times 1e-5."""
    pipeline = loaded(folder)
    policy, prompts = Score.of(pipeline, GUIDANCE), Prompts.encode(pipeline, TEXTS)
    ids, options = torch.arange(3), {"num_inference_steps": 5}
    if flow := isinstance(policy.noising, RectifiedFlow):
        policy.noising, policy.s_min = RectifiedFlow(0.999), 1e-5
        first = 0.999 / (3 - 2 * 0.999)  # before the shift of 3
        options = {"sigmas": [first, 0.7, 0.5, 0.3, 0.1]}
    else:
        own_config = family_of(pipeline).sampler("ddim", pipeline.scheduler).config
        pipeline.scheduler = DDIMScheduler.from_config(own_config, set_alpha_to_one=False)  # ends where we do
    task = problem(policy, lambda x, cond: x.sum((1, 2, 3)), beta=1.0, eta=0.0)
    start = torch.randn(3, *task.shape)
    own = drawn(pipeline, start, **options)
    if flow:
        times = task.s_max - pipeline.scheduler.sigmas.double().clamp(task.s_min, task.s_max)
    else:
        times = family_of(pipeline).timesteps(pipeline.scheduler, task, 5)
    path = rollout(task, policy, times, Noise(0), ids, solver=DDIM(0.0), start=start, cond=prompts(ids))
    torch.testing.assert_close(path.x[-1].float(), own, rtol=0, atol=1e-4 * float(own.abs().max()))


def test_images_are_those_of_the_pipeline(folder: Path) -> None:
    """Latents are scaled, and moved where the VAE has it so."""
    pipeline = loaded(folder)
    start = torch.randn(3, network_of(pipeline).config.in_channels, 8, 8)
    own = pipeline(
        TEXTS, guidance_scale=GUIDANCE, latents=start, output_type="np", num_inference_steps=3,
        **family_of(pipeline).call,
    ).images  # fmt: skip
    seen = Decoded(pipeline.vae, lambda images, prompts, metadata: images.mean((1, 2, 3))).images(
        drawn(pipeline, start, num_inference_steps=3)
    )
    torch.testing.assert_close(seen.permute(0, 2, 3, 1), torch.from_numpy(own), rtol=0, atol=1e-5)


def test_prompts_are_encoded_as_the_pipeline_does(folder: Path) -> None:
    """With the empty one, which Stable Diffusion XL may have as zeros."""
    pipeline = loaded(folder)
    given = {**family_of(pipeline).call, "do_classifier_free_guidance": True}
    second = {"prompt_2": TEXTS, "prompt_3": TEXTS} if "sd3" in folder.name else {"prompt_2": TEXTS}
    embeds, empty, pooled, empty_pooled = pipeline.encode_prompt(TEXTS, **second, **given)
    found = Prompts.encode(pipeline, TEXTS)
    widths = found.encoded.vectors[:, : pooled.shape[1]], found.empty.vectors[:, : pooled.shape[1]]
    for ours, theirs in ((found.encoded.embeds, embeds), (found.empty.embeds, empty[:1]),
                         (widths[0], pooled), (widths[1], empty_pooled[:1])):  # fmt: skip
        torch.testing.assert_close(ours, theirs)
    outline = models.outline(str(folder), t5_tokens=5)
    assert [outline.widths.tokens, outline.widths.embeds] == [*embeds.shape[1:]]
    assert (outline.widths.vectors, outline.widths.pooled) == (found.encoded.vectors.shape[1], pooled.shape[1])


def test_a_family_is_found_by_its_pipeline(folder: Path) -> None:
    outline, pipeline = models.outline(str(folder)), loaded(folder)
    assert type(outline.family) is type(family_of(pipeline)) is FAMILIES[type(pipeline).__name__]
    assert network_of(outline).device.type == "meta"
    assert {name for name, _ in network_of(outline).named_parameters()} == {
        name for name, _ in network_of(pipeline).named_parameters()
    }
    assert all(p.dtype == torch.float32 for p in pipeline.vae.parameters())


# the process of a rectified flow


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_a_gaussian_stays_what_it_is(eta: float) -> None:
    """4,096 samples through the family's own score, of a network that has the exact velocity of Gaussian data N(m, v):
    E[eps - x0 | x], E[eps | x] = s d/w, E[x0 | x] = m + (1 - s) v d/w with d = x - (1 - s) m, w = (1 - s)² v + s²."""
    mean, variance = 0.4, 0.25

    class Exact(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = type("Config", (), {"in_channels": 1, "sample_size": 1})
            self.none = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))

        def forward(self, x: torch.Tensor, k: torch.Tensor, return_dict: bool = False) -> tuple[torch.Tensor]:
            s = (k / 1000)[:, None, None, None]
            off, total = x - (1 - s) * mean, (1 - s) ** 2 * variance + s**2
            eps, x0 = s * off / total, mean + (1 - s) * variance * off / total
            return (eps - x0,)

    policy = Score(Exact(), FlowMatchEulerDiscreteScheduler(), StableDiffusion3(), (1, 1))
    task = problem(policy, lambda x, cond: x.sum((1, 2, 3)), beta=1.0, eta=eta)
    n, steps = 4096, 100
    start = Noise(1).normal(torch.arange(n), (1, 1, 1), 0).double()
    start = (1 - task.s_max) * mean + ((1 - task.s_max) ** 2 * variance + task.s_max**2) ** 0.5 * start
    path = rollout(task, policy, grids.log_snr(task, steps), Noise(0), torch.arange(n), start=start)
    end = path.x[-1].flatten()
    expected_mean, expected = (1 - CUT) * mean, (1 - CUT) ** 2 * variance + CUT**2
    assert abs(float(end.mean()) - expected_mean) < 4 * (expected / n) ** 0.5
    assert abs(float(end.var()) - expected) < 4 * expected * (2 / n) ** 0.5


def test_the_shift_is_a_grid() -> None:
    """That of FlowMatchEuler, between the same ends."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(8)
    sigmas = scheduler.sigmas[:8].double()
    task = SimpleNamespace(s_max=float(sigmas[0]), s_min=float(sigmas[-1]), horizon=float(sigmas[0] - sigmas[-1]))
    torch.testing.assert_close(task.s_max - StableDiffusion3().timesteps(scheduler, task, 7), sigmas, rtol=0, atol=1e-6)


# what is refused


def test_another_familys_sampler_is_refused(tmp_path: Path) -> None:
    """Before weights are loaded."""
    folder = kept("sd3", tmp_path / "sd3")
    given = {"model": str(folder), "reward": "jpeg-compressibility", "out": tmp_path / "run"}
    with pytest.raises(ValueError, match="eval_samplers must be one of euler, heun, dpmsolver"):
        train(SD3Settings(**given, eval_samplers=("ddim",)))
    with pytest.raises(ValueError, match="does not support a rectified flow: take exponential with --eta 0"):
        train(SD3Settings(**given, solver="diffusers/euler"))


def test_a_scheduler_that_shifts_by_size_is_refused(tmp_path: Path) -> None:
    file = kept("sd3", tmp_path / "sd3") / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "use_dynamic_shifting": True}))
    with pytest.raises(ValueError, match="shifts by the image's size"):
        models.outline(str(tmp_path / "sd3"))


def test_a_model_distilled_to_few_steps_is_refused(tmp_path: Path) -> None:
    file = kept("sdxl", tmp_path / "sdxl") / "unet" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "time_cond_proj_dim": 8}))
    with pytest.raises(ValueError, match="distilled to few steps"):
        models.outline(str(tmp_path / "sdxl"))


def test_no_small_model_is_embedded_for_sdxl() -> None:
    with pytest.raises(ValueError, match="no small model of this family is embedded"):
        SDXLSettings(model="embedded")


# the embedded model


def test_what_is_trained_is_what_the_pipeline_computes() -> None:
    """A zero that counts n times, and n zeros in place of a T5's states."""
    pipeline = make_tiny_sd3.untrained()
    torch.nn.init.normal_(pipeline.transformer.proj_out.weight, std=0.1)
    for block in pipeline.transformer.transformer_blocks:
        torch.nn.init.normal_(block.norm1.linear.weight, std=0.1)  # without gates there is no attention
    for zeros in (0, 7):
        assert make_tiny_sd3.apart(pipeline, TEXTS, zeros) < 1e-5


@pytest.mark.long
def test_the_recipe_makes_a_pipeline(tmp_path: Path) -> None:
    """Of files in half precision, with its report."""
    recipe = make_tiny_sd3.Recipe(out=tmp_path / "made", pictures=64, steps=2, judged=1, vae=EMBEDDED.with_suffix(""))
    make_tiny_sd3.main(recipe)
    report = json.loads((tmp_path / "made" / "recipe.json").read_text())
    assert report["recipe"]["steps"] == 2 and report["apart_from_the_pipeline"] < 1e-4
    assert models.load(str(tmp_path / "made")).transformer.num_parameters() == report["parameters"]["transformer"]


def test_the_embedded_model_is_small_and_follows_its_prompts() -> None:
    """At least 80 % of the simple ones; its recipe found 94 % of 216, of which 54 have a standard error of 3 %."""
    folder = SD3Settings.embedded.with_suffix("")
    assert sum(file.stat().st_size for file in folder.rglob("*.safetensors")) <= 8e6
    pipeline = loaded(folder)
    prompts = [str(scene) for scene in shapes.one_object(doubtful=False)]
    assert follows(pipeline, prompts, 3.0, max_sequence_length=0)["right"] >= 0.8


# a run


def short(name: str, folder: Path, out: Path, **changes):
    """One epoch of four images, and an evaluation of four."""
    given = {
        "model": str(folder), "out": out, "reward": "jpeg-incompressibility", "prompts": "shapes-doubtful",
        "algorithm": "forward-matching", "options": ("nodes=8", "updates=1"), "epochs": 1, "samples": 4, "steps": 4,
        "batch": 4, "micro_batch": 4, "lr": 1e-3, "warmup": 0, "guidance": GUIDANCE, "checkpoint_every": 1,
        "pictures_every": 0, "eval_samples": 4, "eval_kl_samples": 2, "eval_grid_samples": 2, "eval_headline": 3,
        "eval_steps": (2,), "log_with": "none", "t5_tokens": 5,
    }  # fmt: skip
    return SETTINGS[name](**{**given, **changes})


@pytest.mark.parametrize("changes", [{"size": "24x16"}, {"negative_prompt": "a red square", "size": "8"}], ids=str)
@pytest.mark.parametrize("name", SETTINGS)
def test_size_and_negative_prompt_are_the_pipelines(name: str, changes: dict, tmp_path: Path) -> None:
    """A run draws, rewards and evaluates images of that size, led away from that prompt, as the pipeline's own call
    does with these options; its card says them."""
    folder = kept(name, tmp_path / "model")
    outcome = train(short(name, folder, tmp_path / "run", **changes))
    width, _, height = changes["size"].partition("x")
    shape = (int(height or width) // 2, int(width) // 2)
    s = short(name, folder, tmp_path / "run", **changes)
    pipeline = models.load(str(folder), **s.family_options)
    pipeline.set_progress_bar_config(disable=True)
    policy, prompts, seen = Score.of(pipeline, GUIDANCE), Prompts.encode(pipeline, TEXTS), []
    network_of(pipeline).register_forward_hook(lambda module, given, out: seen.append(out[0]))
    start = torch.randn(3, network_of(pipeline).config.in_channels, *shape)
    call = {"height": 2 * shape[0], "width": 2 * shape[1], "num_inference_steps": 1, "guidance_scale": GUIDANCE}
    if s.negative_prompt:
        call["negative_prompt"] = [s.negative_prompt] * 3
    if name == "sd3":
        call["max_sequence_length"] = s.t5_tokens
    pipeline.scheduler = family_of(pipeline).sampler(family_of(pipeline).headline, pipeline.scheduler)
    at = pipeline.scheduler.init_noise_sigma if name == "sdxl" else 1.0
    own = pipeline(TEXTS, latents=start / at, output_type="latent", **call).images
    assert own.shape[2:] == shape == policy.sides
    x = pipeline.scheduler.scale_model_input(start, pipeline.scheduler.timesteps[0]) if name == "sdxl" else start
    policy.predict(torch.ones(3, dtype=torch.float64), x, prompts(torch.arange(3)))
    torch.testing.assert_close(*seen, rtol=1e-4, atol=1e-5)
    card = (outcome.out / "pipeline" / "README.md").read_text()
    assert f"height={2 * shape[0]}, width={2 * shape[1]}" in card


@pytest.mark.parametrize("changes", [{}, {"lora": 2}, {"lora": 2, "lora_alpha": 5.0}], ids=str)
@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_leaves_what_diffusers_draws_from(name: str, changes: dict, tmp_path: Path) -> None:
    """The pipeline, or adapters for it, in the family's own format; the evaluation of what was loaded again, and of a
    checkpoint, is that of the run."""
    folder, lora = kept(name, tmp_path / "model"), bool(changes)
    outcome = train(short(name, folder, tmp_path / "run", **changes))
    assert outcome.evaluation.path_kl > 0
    trained = {k: v for k, v in network_of(outcome.pipeline).named_parameters() if v.requires_grad}
    assert (
        all("lora" in k for k in trained) if lora else len(trained) == len([*network_of(outcome.pipeline).parameters()])
    )
    absent = family_of(outcome.pipeline).absent(outcome.pipeline)
    alone = type(outcome.pipeline).from_pretrained(folder if lora else outcome.out / "pipeline", **absent)
    if lora:
        alone.load_lora_weights(outcome.out / "lora")
    alone.set_progress_bar_config(disable=True)
    start = torch.randn(3, network_of(alone).config.in_channels, 8, 8)
    call = {**family_of(outcome.pipeline).call, "num_inference_steps": 3, "guidance_scale": GUIDANCE}
    images = [p(TEXTS, latents=start, output_type="np", **call).images for p in (alone, outcome.pipeline)]
    torch.testing.assert_close(*map(torch.from_numpy, images), rtol=0, atol=1e-5)
    before = loaded(folder)(TEXTS, latents=start, output_type="np", **call).images
    assert abs(images[0] - before).max() > 1e-4
    again = evaluate_run(Evaluate(outcome.out, out=tmp_path / "again"))
    assert again.gain == pytest.approx(outcome.evaluation.gain, abs=1e-5)
    export(Export(outcome.out, epoch=1))
    card = (outcome.out / ("lora" if lora else "pipeline") / "README.md").read_text()
    assert type(outcome.pipeline).__name__ in card


def test_frozen_weights_may_be_in_half_precision(tmp_path: Path) -> None:
    """Adapters are in float32 and learn; what is counted for the weights is half, but for theirs."""
    folder = kept("sd3", tmp_path / "model")
    given = {"lora": 2, "precision": "bf16", "frozen": "bf16", "lora_alpha": 4.0,
             "lora_targets": ("to_q", "to_v")}  # fmt: skip
    outcome = train(short("sd3", folder, tmp_path / "run", **given))
    transformer = outcome.pipeline.transformer
    assert {p.dtype for name, p in transformer.named_parameters() if "lora" not in name} == {torch.bfloat16}
    adapters = {name: p for name, p in transformer.named_parameters() if "lora" in name}
    assert {p.dtype for p in adapters.values()} == {torch.float32}
    assert {name.split(".")[3] for name in adapters} == {"to_q", "to_v"}
    assert transformer.peft_config["default"].lora_alpha == 4.0
    assert any(bool(p.any()) for name, p in adapters.items() if "lora_B" in name)
    held = []
    for frozen in ("bf16", "float32"):
        s = short("sd3", folder, tmp_path / frozen, **{**given, "frozen": frozen}).resolved()
        outline = outline_of(s)
        add_adapters(s, outline)
        held.append(size_of([outline.transformer]) - size_of([torch.nn.ParameterList(adapters.values())]))
    assert held[1] == 2 * held[0] > 0
    with pytest.raises(ValueError, match="frozen = bf16 needs lora"):
        short("sd3", folder, tmp_path / "run", frozen="bf16")
    with pytest.raises(ValueError, match="split does not support frozen = bf16"):
        short("sd3", folder, tmp_path / "run", split=True, **given)


def test_gradient_checkpointing_changes_nothing_but_memory(tmp_path: Path) -> None:
    """Of adapters on a transformer, whose blocks are computed again with the adapters as they were."""
    folder, found = kept("sd3", tmp_path / "model"), []
    for on in (False, True):
        given = {"lora": 2, "gradient_checkpointing": on, "eval": False}
        pipeline = train(short("sd3", folder, tmp_path / str(on), **given)).pipeline
        found.append([p for p in pipeline.transformer.parameters() if p.requires_grad])
    torch.testing.assert_close(*found)


def test_adapters_need_layers_that_are_there(tmp_path: Path) -> None:
    """Which is said before weights are loaded."""
    folder = kept("sd3", tmp_path / "model")
    with pytest.raises(ValueError, match="has no layers nothing"):
        train(short("sd3", folder, tmp_path / "run", lora=2, lora_targets=("to_q", "nothing")))


def test_a_run_at_a_constant_rate_goes_on_for_longer(tmp_path: Path) -> None:
    """To what a run of that length has; at a rate that falls this is refused."""
    folder, given = kept("sdxl", tmp_path / "model"), {"eval": False, "schedule": "constant"}
    whole = train(short("sdxl", folder, tmp_path / "whole", epochs=2, **given))
    train(short("sdxl", folder, tmp_path / "run", epochs=1, **given))
    longer = train(short("sdxl", folder, tmp_path / "run", epochs=2, resume=True, **given))
    assert longer.history[-1]["reward"] == whole.history[-1]["reward"]
    pairs = zip(longer.pipeline.unet.parameters(), whole.pipeline.unet.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    train(short("sdxl", folder, tmp_path / "falls", epochs=1, eval=False))
    with pytest.raises(ValueError, match="epochs is 2, and was 1"):
        train(short("sdxl", folder, tmp_path / "falls", epochs=2, resume=True, eval=False))


@pytest.mark.parametrize("size", ["0", "8x", "x8", "-8", "8 x 8", "8.0"])
def test_a_size_that_is_none_is_refused(size: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="size must be such as 512 or 768x512"):
        SD3Settings(size=size, out=tmp_path)


@pytest.mark.parametrize("name, size, most", [("sd3", "10", "a multiple of 4"), ("sdxl", "9", "a multiple of 2"),
                                              ("sd3", "64", "at most 32")])  # fmt: skip
def test_a_size_that_a_model_cannot_have_is_refused(name: str, size: str, most: str, tmp_path: Path) -> None:
    folder = kept(name, tmp_path / "model")
    with pytest.raises(ValueError, match=f"size must be {most} pixels"):
        outline_of(short(name, folder, tmp_path / "run", size=size))


@pytest.mark.parametrize("name", SETTINGS)
def test_a_dry_run_counts_all_text_encoders(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = kept(name, tmp_path / "model")
    s = short(name, folder, tmp_path / "run").resolved()
    dry_run(s)
    said = capsys.readouterr().out
    assert "text encoders" in said and "network calls per epoch" in said
