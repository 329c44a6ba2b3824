"""A tiny Stable Diffusion with random weights goes through the same `fit` as the toy problems, and comes out whole."""

import dataclasses
import inspect
import json
import math
import weakref
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import scale.diffusion
from ctrl import DDIM, Exponential, Noise, Noising, Problem, Solver, StructuredCritic, Trajectory, grids, rollout
from ctrl.algorithms import DDPO, ActorCritic, Algorithm
from ctrl.fit import Result, Run, Settings, fit
from ctrl.value import Critic, NetworkCritic
from scale import finetune, tuning
from scale.diffusion import Decoded, Prompts, Score, StandIn, Value, problem
from scale.families import Encoded
from scale.families.base import SAMPLERS
from scale.families.stable_diffusion import StableDiffusion
from scale.models import SD15_UNET, load
from scale.prompts import Prompt
from scale.samplers import REFUSED, BlackBox, sampler

PROMPTS = ["a red fox", "hare", "an owl"]
GUIDANCE = 3.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline in the file format of SD v1.5 and with its schedule: latents 4x8x8, images 16x16."""
    path = tmp_path_factory.mktemp("tiny")
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(c + "</w>" for c in letters)]
    (path / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (path / "merges.txt").write_text("#version: 0.2\n")
    torch.manual_seed(0)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=16, projection_dim=16, bos_token_id=0, eos_token_id=1, pad_token_id=1,
        )
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=8, cross_attention_dim=16,
        attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 16), norm_num_groups=8, latent_channels=4, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000, steps_offset=1,
        skip_prk_steps=True, set_alpha_to_one=False,
    )  # fmt: skip
    StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=CLIPTokenizer.from_pretrained(path, model_max_length=16),
        unet=unet, scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(path / "pipeline")  # fmt: skip
    return path / "pipeline"


@pytest.fixture
def pipeline(folder: Path) -> StableDiffusionPipeline:
    return tiny(folder)


def tiny(folder: Path, dtype: torch.dtype = torch.float64) -> StableDiffusionPipeline:
    """The pipeline with DDIM in place of PNDM, as the papers sample, and without bars."""
    pipeline = load(str(folder)).to(dtype)
    pipeline.scheduler = DDIMScheduler.from_config({**pipeline.scheduler.config, "clip_sample": False})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class Brightness:
    """A reward that can be recomputed by hand: how red an image is, and how long its prompt. As a black box, it hands
    out numbers without a graph."""

    def __init__(self, black_box: bool) -> None:
        self.black_box, self.differentiable = black_box, not black_box

    def __call__(self, images: Tensor, prompts: list[str], metadata: object = None) -> Tensor:
        assert images.shape[1:] == (3, 16, 16)
        assert bool(((images >= 0) & (images <= 1)).all())
        red = images[:, 0].mean((1, 2)) + images.new_tensor([float(len(p)) for p in prompts])
        return torch.from_numpy(red.cpu().numpy()) if self.black_box else red


def settings(**changes: object) -> Settings:
    plain = {"epochs": 1, "samples": 4, "steps": 3, "batch": 4, "lr": 1e-3, "progress": False}
    return Settings(**{**plain, **changes})  # type: ignore[arg-type]


def ends(pipeline: StableDiffusionPipeline, found: dict[str, Tensor]):
    """A callback that rewards the decoded ends of the newest trajectories again, through the pipeline's own parts."""

    def callback(run: Run, metrics: dict[str, object]) -> None:
        path = run.replay.collections[-1].trajectory
        with torch.no_grad():
            decoded = pipeline.vae.decode(path.x[-1] / pipeline.vae.config.scaling_factor).sample
        images = pipeline.image_processor.postprocess(decoded, output_type="pt")
        found["reward"] = Brightness(False)(images, [PROMPTS[int(i) % 3] for i in path.ids])

    return callback


def structured(task: Problem, prompts: Prompts, stand_in: bool = False) -> Critic:
    reward = StandIn(4, 8, prompts.width, 8) if stand_in else None
    return StructuredCritic(task, Value(4, 8, prompts.width, 8), reward=reward)


ACTOR_CRITIC = ActorCritic(critic_updates=1, actor_updates=1, nodes=8, keep=1)


def train(
    pipeline: StableDiffusionPipeline,
    algorithm: Algorithm = ACTOR_CRITIC,
    checkpointing: bool = False,
    **changes: object,
) -> Result:
    """An epoch with a differentiable reward and a structured critic, everything from one seed."""
    torch.manual_seed(1)
    policy, prompts = Score.of(pipeline, GUIDANCE), Prompts.encode(pipeline, PROMPTS)
    if checkpointing:
        policy.network.enable_gradient_checkpointing()
    task = problem(policy.frozen(), Decoded(pipeline.vae, Brightness(False), differentiable=True, chunk=3), beta=0.1)
    critic = structured(task, prompts)
    return fit(task, policy, algorithm, critic=critic, conditions=prompts, settings=settings(**changes))


# prompts


def test_many_prompts_are_encoded_in_pieces(pipeline: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the same numbers, to rounding; a large table stays in host memory, its rows go where they are used."""
    device = Accelerator().device
    pipeline.to(device)
    texts = [f"{word} {i}" for i in range(40) for word in ("a fox", "an owl")]
    whole, sizes = Prompts.encode(pipeline, texts), []
    assert whole.encoded.embeds.device == device
    handle = pipeline.text_encoder.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    monkeypatch.setattr(scale.diffusion, "ENCODED", 32)
    monkeypatch.setattr(scale.diffusion, "ON_DEVICE", whole.encoded.embeds.nbytes)  # the empty prompt is one more
    parts = Prompts.encode(pipeline, texts)
    handle.remove()
    assert sizes == [32, 32, 17] and parts.encoded.embeds.device.type == "cpu"
    ids = torch.tensor([3, 79, 80], device=device)
    for of in (lambda cond: cond.embeds, lambda cond: cond.pooled, lambda cond: cond.empty[0]):
        found, expected = of(parts(ids)), of(whole(ids))
        assert found.device == device
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


# the process


def test_policy_starts_as_the_reference(pipeline: StableDiffusionPipeline) -> None:
    policy, prompts = Score.of(pipeline, GUIDANCE), Prompts.encode(pipeline, PROMPTS)
    reference = policy.frozen()
    t, x, cond = torch.rand(5), torch.randn(5, 4, 8, 8), prompts(torch.arange(5))
    assert torch.equal(policy(t, x, cond), reference(t, x, cond))
    next(policy.parameters()).data += 1
    assert not torch.equal(policy(t, x, cond), reference(t, x, cond))
    assert not any(p.requires_grad for p in reference.parameters())


def nodes_of(task, scheduler: DDIMScheduler) -> Tensor:
    """The times of a scheduler's timesteps, and of timestep 0, where it ends."""
    s = torch.cat([scheduler.timesteps + 1, torch.ones(1)]).double() / 1000
    return (task.s_max - s).clamp(max=task.horizon)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("ddim_eta", [0.0, 1.0])
@pytest.mark.parametrize("guidance", [1.0, GUIDANCE])
def test_ddim_is_the_schedulers(
    pipeline: StableDiffusionPipeline, prediction: str, ddim_eta: float, guidance: float
) -> None:
    """Every state of a rollout on the scheduler's timesteps is the scheduler's own, given the same noise."""
    scheduler = DDIMScheduler.from_config({**pipeline.scheduler.config, "prediction_type": prediction})
    scheduler.alphas_cumprod = (1 - scheduler.betas.double()).cumprod(0)  # diffusers' is rounded to float32
    scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    scheduler.set_timesteps(5)
    pipeline.scheduler = scheduler
    policy, prompts = Score.of(pipeline, guidance), Prompts.encode(pipeline, PROMPTS)
    task = problem(policy, Decoded(pipeline.vae, Brightness(True)), beta=1.0)
    ids, x = torch.arange(3), torch.randn(3, 4, 8, 8)
    solver, times = DDIM(ddim_eta), nodes_of(task, scheduler)
    path = rollout(task, policy, times, Noise(0), ids, solver=solver, cond=prompts(ids), start=x)
    text, empty = pipeline.encode_prompt(PROMPTS, "cpu", 1, do_classifier_free_guidance=True)
    assert path.xi is not None
    for k, timestep in enumerate(scheduler.timesteps):
        with torch.no_grad():
            out = pipeline.unet(x, timestep, encoder_hidden_states=text).sample
            plain = pipeline.unet(x, timestep, encoder_hidden_states=empty).sample
        out = plain + guidance * (out - plain)
        x = scheduler.step(out, timestep, x, eta=ddim_eta, variance_noise=path.xi[k] if ddim_eta else None).prev_sample
        torch.testing.assert_close(path.x[k + 1], x, rtol=1e-9, atol=1e-9)


def test_rollout_draws_the_pipelines_images(folder: Path) -> None:
    """In float32, as shipped, the images and the reward of a rollout are those of the pipeline's own call."""
    torch.set_default_dtype(torch.float32)
    pipeline = tiny(folder, torch.float32)
    policy, prompts, ids = Score.of(pipeline, GUIDANCE), Prompts.encode(pipeline, PROMPTS), torch.arange(3)
    reward = Decoded(pipeline.vae, Brightness(True), chunk=2)
    task, start = problem(policy, reward, beta=1.0), torch.randn(3, 4, 8, 8)
    shown = pipeline(PROMPTS, num_inference_steps=5, guidance_scale=GUIDANCE, latents=start, output_type="pt").images
    times = nodes_of(task, pipeline.scheduler)
    path = rollout(task, policy, times, Noise(0), ids, solver=DDIM(0.0), cond=prompts(ids), start=start)
    assert path.x.dtype == torch.float32
    with torch.no_grad():
        images = reward.images(path.x[-1])
    torch.testing.assert_close(images, shown, rtol=0, atol=1e-4)
    torch.testing.assert_close(reward(path.x[-1], prompts(ids)), Brightness(True)(shown, PROMPTS), rtol=0, atol=1e-4)


def test_images_are_decoded_outside_of_autocast(folder: Path) -> None:
    """In the VAE's own precision: some VAEs overflow in half of it. Bit for bit, in a rollout's reward too."""
    torch.set_default_dtype(torch.float32)
    pipeline, x, seen = tiny(folder, torch.float32), torch.randn(3, 4, 8, 8), []

    def look(images: Tensor, prompts: list[str], metadata: object) -> Tensor:
        seen.append(images)
        return images.mean((1, 2, 3))

    reward = Decoded(pipeline.vae, look)
    images = reward.images(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(reward.images(x), images)
        reward(x)
    assert torch.equal(seen[0], images)


def test_a_rewards_gradient_holds_the_graph_of_one_image(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And is that of all images decoded at once. The VAE here makes images of 16 x 16, as many as fit in DECODED at a
    time; what its middle makes of them is alive as long as their graph is."""
    monkeypatch.setattr(scale.diffusion, "DECODED", 16 * 16, raising=False)
    pipeline, alive, most = tiny(folder), list[weakref.ref[Tensor]](), [0]

    def note(module: nn.Module, args: object, out: Tensor) -> None:
        alive.append(weakref.ref(out))
        most[0] = max(most[0], sum(len(v) for ref in alive if (v := ref()) is not None))

    pipeline.vae.decoder.mid_block.register_forward_hook(note)
    x = torch.randn(4, 4, 8, 8, requires_grad=True)
    red = Decoded(pipeline.vae, Brightness(False), differentiable=True)(x)
    (grad,) = torch.autograd.grad(red.sum(), x)
    assert most[0] == 1
    images = (pipeline.vae.decode(x / pipeline.vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    whole = images[:, 0].mean((1, 2))
    torch.testing.assert_close(red, whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad, torch.autograd.grad(whole.sum(), x)[0], rtol=1e-9, atol=1e-12)


def test_images_are_decoded_as_many_at_a_time_as_fit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a gradient too, whatever is given at once; the reward sees them all."""
    monkeypatch.setattr(scale.diffusion, "DECODED", 3 * 16 * 16, raising=False)
    pipeline, sizes, seen = tiny(folder), list[int](), list[int]()

    def look(images: Tensor, prompts: list[str], metadata: object) -> Tensor:
        seen.append(len(images))
        return images.mean((1, 2, 3))

    pipeline.vae.decoder.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    with torch.no_grad():
        Decoded(pipeline.vae, look)(torch.randn(7, 4, 8, 8))
    assert sizes == [3, 3, 1] and seen == [7]


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
DETERMINISTIC = [name for name in SAMPLERS if not name.startswith("sde")]


def drawn_by(box: BlackBox, pipeline: StableDiffusionPipeline, steps: int, start: Tensor) -> tuple[Trajectory, Tensor]:
    """A rollout by a diffusers scheduler, and the images that it decodes to."""
    policy, prompts, ids = Score.of(pipeline, GUIDANCE), Prompts.encode(pipeline, PROMPTS), torch.arange(3)
    reward = Decoded(pipeline.vae, Brightness(True))
    task = problem(policy, reward, beta=1.0, eta=1.0 if box.noisy else 0.0)
    times = box.grid(task, steps)
    path = rollout(task, policy, times, Noise(0), ids, solver=box, cond=prompts(ids), start=start)
    with torch.no_grad():
        return path, reward.images(path.x[-1])


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_a_schedulers_rollout_draws_the_pipelines_images(folder: Path, name: str, prediction: str) -> None:
    """In float32, by the pipeline's own call with that scheduler; and twice, since a scheduler remembers. Where latents
    are scaled, the pipeline starts from noise of size sigma, 0.2 % short of the network's own scale: it gets more."""
    torch.set_default_dtype(torch.float32)
    pipeline, start = tiny(folder, torch.float32), torch.randn(3, 4, 8, 8)
    pipeline.scheduler = DDIMScheduler.from_config({**pipeline.scheduler.config, "prediction_type": prediction})
    box = sampler(name, pipeline)
    pipeline.scheduler = box.scheduler
    box.scheduler.set_timesteps(5)
    unit = box.scheduler.init_noise_sigma * box.scheduler.scale_model_input(torch.ones(()), box.scheduler.timesteps[0])
    given = {"guidance_scale": GUIDANCE, "latents": start / unit, "output_type": "pt"}
    shown = pipeline(PROMPTS, num_inference_steps=5, **given).images
    for _ in range(2):
        path, images = drawn_by(box, pipeline, 5, start)
        torch.testing.assert_close(images, shown, rtol=0, atol=1e-4)
    assert len(path.t) == 6 and path.x[0] is not start
    torch.testing.assert_close(path.x[0], start, rtol=1e-5, atol=1e-5)


def test_a_schedulers_noise_is_keyed_by_sample(pipeline: StableDiffusionPipeline) -> None:
    """SDE-DPM-Solver++ by hand, with the rollout's noise; its table is float32."""
    start = torch.randn(3, 4, 8, 8)
    path, _ = drawn_by(sampler("sde-dpmsolver++", pipeline), pipeline, 5, start)
    scheduler = sampler("sde-dpmsolver++", pipeline).scheduler
    scheduler.set_timesteps(5)
    text, empty = pipeline.encode_prompt(PROMPTS, "cpu", 1, do_classifier_free_guidance=True)
    x = start
    assert path.xi is not None
    for k, timestep in enumerate(scheduler.timesteps):
        torch.testing.assert_close(path.x[k], x, rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            out, plain = (pipeline.unet(x, timestep, encoder_hidden_states=e).sample for e in (text, empty))
        x = scheduler.step(plain + GUIDANCE * (out - plain), timestep, x, variance_noise=path.xi[k]).prev_sample
    torch.testing.assert_close(path.x[-1], x, rtol=1e-5, atol=1e-5)


def test_what_a_scheduler_gets_in_between_is_no_node(pipeline: StableDiffusionPipeline) -> None:
    """Heun's second stage asks at the time of the next node, at another state; nodes are the first stages."""
    box, asked = sampler("heun", pipeline), []
    pipeline.unet.register_forward_pre_hook(lambda module, args: asked.append(float(args[1][0])))
    path, _ = drawn_by(box, pipeline, 4, torch.randn(3, 4, 8, 8))
    assert box.calls == 2 and [round(k) for k in asked] == [999, 749, 749, 499, 499, 249, 249]
    assert [round(1000 * (1 - float(t)) - 1) for t in path.t] == [999, 749, 499, 249, 0]


@pytest.mark.parametrize("name", ["dpmsolver++", "heun"])
def test_a_black_box_is_learned_from(pipeline: StableDiffusionPipeline, name: str) -> None:
    """The probability flow under a scheduler, by the same fit; there is no KL to be reported."""
    torch.manual_seed(1)
    policy, prompts = Score.of(pipeline, GUIDANCE), Prompts.encode(pipeline, PROMPTS)
    before = [p.clone() for p in policy.parameters()]
    task = problem(policy.frozen(), Decoded(pipeline.vae, Brightness(True)), beta=0.1, eta=0.0)
    box, algorithm = sampler(name, pipeline), dataclasses.replace(ACTOR_CRITIC, nats=math.inf)
    critic = NetworkCritic(task, Value(4, 8, prompts.width, 8))
    plan = settings(solver=box, grid=box.grid, jitter=0.0, steps=3)
    for wrong, message in (({"jitter": 0.3}, "must be the sampler's own"), ({"grid": grids.uniform}, "sampler's own")):
        with pytest.raises(ValueError, match=message):
            fit(task, policy, algorithm, critic=critic, conditions=prompts, settings=dataclasses.replace(plan, **wrong))
    (metrics,) = fit(task, policy, algorithm, critic=critic, conditions=prompts, settings=plan).history
    assert "kl" not in metrics and math.isfinite(metrics["reward"])
    drawn = 4 * {"dpmsolver++": 3, "heun": 5}[name]  # the last step of Heun's has one stage
    learning = 2 * 4 * 4 + 3 * 8  # reference and V; critic, label, policy
    assert metrics["network_calls"] == drawn + 4 + learning  # the last node
    assert any(not torch.equal(p.cpu(), q) for p, q in zip(policy.parameters(), before, strict=True))


@pytest.mark.parametrize("name", [*REFUSED, "plms2"])
def test_samplers_of_no_use_say_why(pipeline: StableDiffusionPipeline, name: str) -> None:
    with pytest.raises(ValueError, match=REFUSED.get(name, "sampler must be one of ddim, dpmsolver")):
        sampler(name, pipeline)


V15 = {  # as in the hub's file of SD v1.5
    "_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "beta_start": 0.00085, "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True,
    "steps_offset": 1, "trained_betas": None, "clip_sample": False,
}  # fmt: skip


@pytest.mark.parametrize("name", [*SAMPLERS])
def test_a_sampler_takes_the_process_and_none_of_the_habits(pipeline: StableDiffusionPipeline, name: str) -> None:
    """From the scheduler that SD v1.5 comes with, and from another sampler's."""
    for config in (PNDMScheduler.from_config(V15), DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++",
                   use_karras_sigmas=True, prediction_type="v_prediction", **BETAS)):  # fmt: skip
        pipeline.scheduler = config
        box = sampler(name, pipeline)
        assert torch.equal(box.scheduler.betas, PNDMScheduler.from_config(V15).betas)
        assert box.noisy is (name == "sde-dpmsolver++")
        assert box.scheduler.config.prediction_type == config.config.prediction_type
        assert not box.scheduler.config.get("use_karras_sigmas")
        box.scheduler.set_timesteps(10)
        assert [round(float(t)) for t in box.scheduler.timesteps[:: box.calls]] == [999 - 100 * k for k in range(10)]


def test_noise_where_there_is_none_is_refused(pipeline: StableDiffusionPipeline) -> None:
    for name, eta in (("euler", 1.0), ("sde-dpmsolver++", 0.0), ("sde-dpmsolver++", 0.5)):
        task = problem(Score.of(pipeline), Decoded(pipeline.vae, Brightness(True)), beta=1.0, eta=eta)
        box = sampler(name, pipeline)
        with pytest.raises(ValueError, match=f"needs a problem with eta = {int(box.noisy)}, got eta = {eta}"):
            box.plan(task, box.grid(task, 4))


def test_ddim_falls_behind_where_steps_do_not_divide(pipeline: StableDiffusionPipeline) -> None:
    task = problem(Score.of(pipeline), Decoded(pipeline.vae, Brightness(True)), beta=1.0)
    with pytest.raises(ValueError, match="steps must divide 1000 for DDIM, got 6"):
        sampler("ddim", pipeline).grid(task, 6)
    assert len(sampler("unipc", pipeline).grid(task, 6)) == 7


def test_a_grid_that_ends_early_is_refused(pipeline: StableDiffusionPipeline) -> None:
    task = problem(Score.of(pipeline), Decoded(pipeline.vae, Brightness(True)), beta=1.0)
    leading = BlackBox(DDIMScheduler.from_config({**pipeline.scheduler.config, "timestep_spacing": "leading"}))
    with pytest.raises(ValueError, match="take timestep_spacing='trailing'"):
        leading.grid(task, 5)
    with pytest.raises(ValueError, match="take timestep_spacing='trailing'"):
        sampler("ddim", pipeline).grid(task, 1000)


def test_clock_is_the_problems(pipeline: StableDiffusionPipeline) -> None:
    """The UNet is asked at the timestep K s - 1 of the problem's own s, and never below 0."""
    policy, prompts, asked = Score.of(pipeline), Prompts.encode(pipeline, PROMPTS), []
    task = problem(policy, Decoded(pipeline.vae, Brightness(True)), beta=1.0)
    pipeline.unet.register_forward_pre_hook(lambda module, args: asked.append(args[1]))
    t = torch.tensor([0.0, 0.3021, task.horizon, 1.0])
    policy(t, torch.randn(4, 4, 8, 8), prompts(torch.arange(4)))
    torch.testing.assert_close(asked[0], 1000 * task.s(t) - 1)
    torch.testing.assert_close(asked[0], torch.tensor([999.0, 696.9, 0.0, 0.0]), rtol=0, atol=1e-9)


def test_conditions_are_picked_like_tensors(pipeline: StableDiffusionPipeline) -> None:
    prompts = Prompts.encode(pipeline, PROMPTS)
    text, empty = pipeline.encode_prompt(PROMPTS, "cpu", 1, do_classifier_free_guidance=True)
    cond = prompts(torch.tensor([4, 3, 2]))
    assert [p.text for p in cond.prompts] == ["hare", "a red fox", "an owl"]
    for piece in (slice(1, 3), torch.tensor([2, 0, 0])):
        torch.testing.assert_close(cond[piece].embeds, text[[1, 0, 2]][piece])
        torch.testing.assert_close(cond[piece].empty[0], empty[[0, 1, 2]][piece])
        assert cond[piece].prompts == [cond.prompts[i] for i in torch.arange(3)[piece]]
        assert len(cond[piece].pooled) == len(cond[piece])


# the loop


@pytest.mark.parametrize("name", ["network", "stand_in", "structured", "ddpo"])
def test_an_epoch(pipeline: StableDiffusionPipeline, name: str) -> None:
    """The UNet moves; VAE, text encoder and reference do not; the reward reported is that of the decoded latents."""
    policy, prompts = Score.of(pipeline, GUIDANCE), Prompts.encode(pipeline, PROMPTS)
    reference, differentiable = policy.frozen(), name == "structured"
    reward = Decoded(pipeline.vae, Brightness(not differentiable), differentiable=differentiable, chunk=3)
    task = problem(reference, reward, beta=0.1)
    critic = {
        "network": lambda: NetworkCritic(task, Value(4, 8, prompts.width, 8)),
        "stand_in": lambda: structured(task, prompts, stand_in=True),
        "structured": lambda: structured(task, prompts),
        "ddpo": lambda: None,
    }[name]()
    algorithm: Algorithm = DDPO(passes=1, nodes=12) if name == "ddpo" else ACTOR_CRITIC
    frozen: list[nn.Module] = [pipeline.vae, pipeline.text_encoder, reference]
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in (*frozen, policy)]
    found: dict[str, Tensor] = {}
    chosen = settings(solver=DDIM()) if name == "ddpo" else settings()
    result = fit(
        task, policy, algorithm, critic=critic, conditions=prompts, settings=chosen, callbacks=[ends(pipeline, found)]
    )
    (metrics,) = result.history
    assert all(torch.isfinite(torch.tensor(float(v))) for v in metrics.values())
    assert metrics["kl"] == 0 and metrics["policy_grad_norm"] > 0
    assert found["reward"].std() > 0.1
    torch.testing.assert_close(torch.tensor(metrics["reward"]), found["reward"].mean().cpu())
    for module, old in zip(frozen, before, strict=False):
        assert all(torch.equal(v.cpu(), old[k]) for k, v in module.state_dict().items())
        assert module is pipeline.text_encoder or not any(p.requires_grad for p in module.parameters())
    assert all(not torch.equal(v.cpu(), before[-1][k]) for k, v in policy.state_dict().items())


def test_black_box_needs_a_stand_in(pipeline: StableDiffusionPipeline) -> None:
    prompts, policy = Prompts.encode(pipeline, PROMPTS), Score.of(pipeline)
    task = problem(policy.frozen(), Decoded(pipeline.vae, Brightness(True)), beta=0.1)
    with pytest.raises(ValueError, match="not differentiable"):
        fit(task, policy, ACTOR_CRITIC, critic=structured(task, prompts), conditions=prompts, settings=settings())


def test_scale_only_supplies() -> None:
    """No class here is a problem, an algorithm, a critic, a noising or a solver: those are the core's, unchanged."""
    ours = [c for _, c in inspect.getmembers(scale.diffusion, inspect.isclass) if c.__module__ == "scale.diffusion"]
    assert len(ours) >= 5
    assert not [c for c in ours if issubclass(c, Problem | Algorithm | Critic | Noising | Solver)]


def gradients(result: Result) -> list[Tensor]:
    """Of the last update of policy and critic."""
    assert isinstance(result.critic, nn.Module)
    return [p.grad for m in (result.policy, result.critic) for p in m.parameters() if p.grad is not None]


def assert_same_gradients(one: Result, other: Result, tolerance: float) -> None:
    pairs = list(zip(gradients(one), gradients(other), strict=True))
    assert len(pairs) > 100
    largest = max(float(a.norm()) for a, _ in pairs)
    assert largest > 0
    assert max(float((a - b).norm()) for a, b in pairs) < tolerance * largest


def test_micro_batches_change_nothing(folder: Path) -> None:
    whole = train(tiny(folder), micro_batch=8, max_grad_norm=float("inf"))
    parts = train(tiny(folder), micro_batch=2, max_grad_norm=float("inf"))
    assert_same_gradients(whole, parts, 1e-6)


def test_gradient_checkpointing_changes_nothing(folder: Path) -> None:
    """Of the policy's loss, and of grad_x V, which runs through the reference, checkpointed like the policy."""
    results, counts = [], []
    for checkpointing in (False, True):
        pipeline, calls = tiny(folder), []
        pipeline.unet.mid_block.resnets[-1].register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        results.append(train(pipeline, checkpointing=checkpointing, max_grad_norm=float("inf")))
        counts.append(len(calls))
    assert counts[1] > counts[0], "nothing was computed a second time: checkpointing was not on"
    assert_same_gradients(*results, 1e-6)


def test_the_trained_unet_goes_back_into_the_pipeline(folder: Path, tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float32)
    pipeline = tiny(folder, torch.float32)
    result = train(pipeline, DDPO(passes=1, nodes=12), solver=Exponential(), ema=0.5)
    start = torch.randn(2, 4, 8, 8)

    def draw(pipeline: StableDiffusionPipeline) -> Tensor:
        return pipeline(PROMPTS[:2], num_inference_steps=3, latents=start, output_type="pt").images

    assert isinstance(result.policy, Score) and isinstance(result.ema, Score)
    assert pipeline.unet is result.policy.network
    images = []
    for trained in (result.policy, result.ema):
        pipeline.unet = trained.network
        images.append(draw(pipeline.to("cpu")))
        pipeline.save_pretrained(tmp_path / "tuned")
        again = tiny(tmp_path / "tuned", torch.float32)
        for name in ("unet", "vae", "text_encoder"):
            kept = getattr(pipeline, name).state_dict()
            assert all(torch.equal(v, kept[k]) for k, v in getattr(again, name).state_dict().items())
        torch.testing.assert_close(draw(again), images[-1], rtol=0, atol=0)
    images.append(draw(tiny(folder, torch.float32)))
    assert not torch.equal(images[0], images[1]) and not torch.equal(images[0], images[2])


@pytest.mark.parametrize("size, halvings, left", [(8, 3, 1), (32, 3, 4), (64, 4, 4), (96, 5, 3), (128, 5, 4)])
def test_a_critic_sees_more_of_a_larger_image(size: int, halvings: int, left: int) -> None:
    """3 x 3 at first, and each halving adds two pixels of its own grid, 1, 2, 4 ... latents apart: 2^(h+1) + 1 a side,
    33 of 64. That is where the value at the centre has a gradient, before the mean over places is taken."""
    tower = Value(4, size, width=4).tower
    x = torch.randn(1, 8, size, size, requires_grad=True)
    values = tower.down(tower.first(x))
    assert values.shape[2:] == (left, left)
    values[0, :, left // 2, left // 2].sum().backward()
    assert x.grad is not None
    seen = x.grad[0].abs().sum(0)
    sides = 2 ** (halvings + 1) + 1
    for rows in (seen.sum(1), seen.sum(0)):
        assert int((rows > 0).sum()) == min(sides, size)


def test_full_size_has_a_critic_of_that_size(pipeline: StableDiffusionPipeline) -> None:
    """By the command: 64 latents a side are halved four times, by the critic and by its stand-in."""
    task = problem(Score.of(pipeline), Decoded(pipeline.vae, Brightness(True)), beta=1.0)
    task = dataclasses.replace(task, shape=(4, 64, 64))
    settings = finetune.Settings(model="mine", critic="structured", critic_width=8)
    critic = tuning.critic_of(settings, task, False, 16)
    assert isinstance(critic, StructuredCritic) and isinstance(critic.stand_in, StandIn)
    assert isinstance(critic.network, Value)
    for tower in (critic.network.tower, critic.stand_in.tower):
        assert tower.down(torch.zeros(1, 8, 64, 64)).shape == (1, 8, 4, 4)


# full size


def full_size(device: str) -> Score:
    """SD v1.5's architecture under its schedule, with random weights, or with none on "meta"."""
    with torch.device(device):
        unet = UNet2DConditionModel.from_config(SD15_UNET)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000).square()
    return Score(unet, DDIMScheduler(trained_betas=betas.tolist()), StableDiffusion(), (64, 64))


def test_the_architecture_of_sd15_is_the_public_one():
    """Its number of parameters and tensors, and where the public files have them."""
    found = {name: tuple(p.shape) for name, p in full_size("meta").network.state_dict().items()}
    assert sum(math.prod(shape) for shape in found.values()) == 859_520_964 and len(found) == 686
    known = {
        "conv_in.weight": (320, 4, 3, 3),
        "time_embedding.linear_1.weight": (1280, 320),
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": (320, 768),
        "down_blocks.2.attentions.1.transformer_blocks.0.ff.net.0.proj.weight": (10240, 1280),
        "mid_block.attentions.0.proj_in.weight": (1280, 1280, 1, 1),
        "up_blocks.3.resnets.2.conv_shortcut.weight": (320, 640, 1, 1),
        "conv_out.bias": (4,),
    }
    assert {name: found.get(name) for name in known} == known


@pytest.mark.long
def test_half_precision_at_full_width():
    """A score, and an update's gradient, on latents of 8 x 8. bfloat16 rounds by 2^-9 relative at most; the UNet has
    some 400 operations in a row, forwards, whose roundings add up like noise, 2^-9 sqrt(400) = 4 %, and as many
    backwards."""
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    policy = full_size("cpu")
    words = torch.randn(2, 77, 768)
    given = Encoded(words, torch.zeros(2, 0), words[:, 0])
    prompts = Prompts([Prompt("a"), Prompt("b")], given, given[:1])
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([0.3, 0.7])
    found = []
    for half in (False, True):
        policy.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            a = policy(t, x, prompts(torch.arange(2)))
            loss = (a - x).square().mean()
        assert a.dtype is loss.dtype is torch.float32
        loss.backward()
        grads = [policy.network.conv_in.weight.grad, policy.network.mid_block.attentions[0].proj_in.weight.grad]
        found.append([a.detach(), *(g.clone() for g in grads)])
    for full, rounded, operations in zip(*found, (400, 800, 800), strict=True):
        assert float((full - rounded).norm() / full.norm()) < 2**-9 * operations**0.5
