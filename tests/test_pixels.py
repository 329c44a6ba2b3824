"""Pixel models under the core: its process is diffusers' own DDPM and DDIM, and sets of pictures are compared right."""

import math
from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from torch import Tensor

from ctrl import DDIM, Exponential, Noise, rollout
from ctrl.problem import ScoreAsAction
from scale import classifiers, pixels
from scale.classifiers import Moments, frechet
from scale.diffusion import Decoded, Score, pictures_of, problem
from scale.families import Ddpm
from scale.rewards import reward_of

K = 40
"""Timesteps of the small schedule."""


@pytest.fixture(autouse=True)
def single(float64: None) -> None:
    """Float32, as models are shipped; what comes after a test puts float64 back."""
    torch.set_default_dtype(torch.float32)


def unet() -> UNet2DModel:
    """Random; its output layer too, so that x0hat meets its limits."""
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=8,
        attention_head_dim=8, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval().requires_grad_(False)  # fmt: skip


def pipeline(prediction: str = "epsilon", clip: bool = True) -> DDPMPipeline:
    """Under DDPM's linear betas, made steeper for fewer timesteps."""
    made = DDPMScheduler(
        num_train_timesteps=K, beta_start=1e-3, beta_end=0.3, prediction_type=prediction, clip_sample=clip,
        variance_type="fixed_small",
    )  # fmt: skip
    return DDPMPipeline(unet(), made)


def brightness(images: Tensor, prompts: list[str], metadata: object) -> Tensor:
    """A reward."""
    return images.mean((1, 2, 3))


def task_of(made: DDPMPipeline) -> ScoreAsAction:
    """Its process."""
    return problem(Score.of(made), Decoded(None, brightness), beta=1.0)


ANY = pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
CLIPPED = pytest.mark.parametrize("clip", [True, False])


@ANY
@CLIPPED
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_process_is_ddim(prediction, clip, eta):
    """Every state of a rollout, in float32, given the same noise; DDIM's direction is that of the clipped x0hat."""
    made = pipeline(prediction, clip)
    box = DDIMScheduler.from_config(made.scheduler.config, set_alpha_to_one=False, timestep_spacing="trailing")
    box.set_timesteps(8)
    task, ids = task_of(made), torch.arange(5)
    start = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    path = rollout(
        task, Score.of(made), Ddpm().timesteps(made.scheduler, task, 8), Noise(0), ids, solver=DDIM(eta), start=start
    )
    assert path.xi is not None
    x, clipped = start, 0
    for k, timestep in enumerate(box.timesteps):
        out = made.unet(x, timestep).sample
        step = box.step(out, timestep, x, eta=eta, use_clipped_model_output=clip, variance_noise=path.xi[k])
        x, clipped = step.prev_sample, clipped + int((step.pred_original_sample.abs() == 1).sum())
        torch.testing.assert_close(path.x[k + 1], x, rtol=0, atol=1e-4)
    assert bool(clipped) == clip


@ANY
def test_the_process_is_ddpm(prediction, monkeypatch):
    """All timesteps of ancestral sampling, given the same noise: the states, and the picture, x0hat of the last."""
    made = pipeline(prediction)
    task, score, ids = task_of(made), Score.of(made), torch.arange(5)
    s = torch.arange(K, 0, -1, dtype=torch.float64) / K  # the last call, at timestep 0, makes x0hat
    times = task.s_max - s
    start = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    path = rollout(task, score, times, Noise(0), ids, solver=Exponential(), start=start)
    assert path.xi is not None
    noise = iter(path.xi)
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *a, **o: next(noise))
    x, box = start, made.scheduler
    box.set_timesteps(K)
    for k, timestep in enumerate(box.timesteps):
        torch.testing.assert_close(path.x[k], x, rtol=0, atol=1e-4)
        x = box.step(made.unet(x, timestep).sample, timestep, x).prev_sample
    end = torch.full((5,), task.horizon)
    s, a = task.s(end), score(end, path.x[-1])
    torch.testing.assert_close(task.noising.tweedie(s, path.x[-1], a), x, rtol=0, atol=1e-4)
    assert float((pictures_of(None, x) - pictures_of(None, path.x[-1])).abs().mean()) < math.sqrt(
        2 * made.scheduler.betas[0]
    )  # what the reward sees is as near as the last noise


@pytest.mark.parametrize("steps", [K, K - 1, 30])
def test_too_many_whole_timesteps_are_refused(steps):
    """Where the last of them would be at the end."""
    with pytest.raises(ValueError, match="end above timestep 0"):
        Ddpm().timesteps(pipeline().scheduler, task_of(pipeline()), steps)
    assert bool((Ddpm().timesteps(pipeline().scheduler, task_of(pipeline()), 20).diff() > 0).all())


def test_a_reward_sees_pictures():
    x = torch.tensor([-1.0, 0.0, 1.0, 3.0])[:, None, None, None].expand(4, 3, 8, 8)
    assert Decoded(None, brightness, chunk=3)(x).tolist() == [0.0, 0.5, 1.0, 1.0]


@pytest.mark.parametrize("name, kind", [("ancestral", DDPMPipeline), ("ddim", DDIMPipeline)])
def test_pictures_are_the_pipelines_own(name, kind):
    """Each from the noise of its id, whatever the batch."""
    made = pipeline("v_prediction")
    images = pixels.draw(made, range(3, 8), name, 8, batch=2)
    rngs = [pixels.generator(pixels.SEED, i) for i in range(3, 8)]
    own = kind(made.unet, pixels.scheduler(name, made))
    own.set_progress_bar_config(disable=True)
    shown = own(batch_size=5, generator=rngs, num_inference_steps=8, output_type="np").images
    torch.testing.assert_close(images, torch.from_numpy(shown).permute(0, 3, 1, 2), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", pixels.SAMPLERS)
def test_every_sampler_draws(name):
    made = pipeline("v_prediction")
    images = pixels.draw(made, range(4), name, 5)
    assert images.shape == (4, 3, 8, 8) and float(images.min()) >= 0 and float(images.max()) <= 1
    assert float(images.std(0).mean()) > 0.01
    torch.testing.assert_close(pixels.draw(made, [2], name, 5)[0], images[2], rtol=0, atol=1e-5)


def test_what_is_saved_is_loaded(tmp_path: Path):
    made = pipeline("v_prediction")
    made.save_pretrained(tmp_path / "m")
    back = pixels.load(str(tmp_path / "m"))
    assert torch.equal(pixels.draw(back, range(2), "ancestral", 4), pixels.draw(made, range(2), "ancestral", 4))


def test_wrong_models_say_so(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no model_index"):
        pixels.load(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="model: there is no folder nobody/nothing, and the hub's could not be loaded"):
        pixels.load("nobody/nothing")
    with pytest.raises(ValueError, match=r"^model: there is no folder \./nothing$"):
        pixels.load("./nothing")
    other = tmp_path / "other"
    other.mkdir()
    (other / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(ValueError, match=r"must be a DDPMPipeline of pictures; .* is a StableDiffusionPipeline"):
        pixels.load(str(other))
    made = pipeline()
    made.scheduler.register_to_config(prediction_type="sample")
    made.save_pretrained(tmp_path / "sample")
    with pytest.raises(ValueError, match="predicts 'sample'"):
        pixels.load(str(tmp_path / "sample"))


def test_weights_are_looked_for_first(tmp_path: Path):
    """Of a variant; pickled ones serve; and all parts may lie in one folder, as in the hub's oldest models."""
    made = pipeline()
    made.save_pretrained(tmp_path / "half", variant="fp16")
    with pytest.raises(ValueError, match="unet has weights of variant fp16 alone: pass --variant fp16"):
        pixels.outline(str(tmp_path / "half"))
    made.save_pretrained(tmp_path / "old", safe_serialization=False)
    for file in (*tmp_path.glob("old/unet/*"), *tmp_path.glob("old/scheduler/*")):
        file.rename(tmp_path / "old" / file.name)
    for part in ("unet", "scheduler"):
        (tmp_path / "old" / part).rmdir()
    for folder, variant in (("half", "fp16"), ("old", None)):
        found = pixels.outline(str(tmp_path / folder), variant=variant)
        again = pixels.load(str(tmp_path / folder), variant=variant)
        assert found.unet.device.type == "meta" and torch.equal(found.scheduler.betas, again.scheduler.betas)
        assert all(torch.equal(v, again.unet.state_dict()[k]) for k, v in made.unet.state_dict().items())
    (tmp_path / "old" / "diffusion_pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match=r"old has no weights in \.safetensors or \.bin"):
        pixels.outline(str(tmp_path / "old"))


# ------------------------------------------------------------------------------------------ sets of pictures


@given(st.integers(1, 6), st.integers(0, 1000))
def test_frechet_distance(d: int, seed: int):
    """As scipy's matrix root has it, symmetric, zero between the same, and |m|² between moved ones."""
    rng = torch.Generator().manual_seed(seed)
    one, two = (Moments.of(torch.randn(50, d, generator=rng) @ torch.randn(d, d, generator=rng) + i) for i in range(2))
    root = torch.from_numpy(sqrtm((one.covariance @ two.covariance).numpy()).real)
    expected = (one.mean - two.mean).square().sum() + (one.covariance + two.covariance - 2 * root).trace()
    size = float(one.covariance.trace() + two.covariance.trace())
    assert frechet(one, two) == pytest.approx(float(expected), abs=1e-5 * size)  # sqrtm: half the digits where singular
    assert frechet(one, two) == pytest.approx(frechet(two, one), abs=1e-6 * size)
    assert frechet(one, one) == pytest.approx(0, abs=1e-6 * size)
    moved = Moments(one.mean + 2, one.covariance, one.n)
    assert frechet(one, moved) == pytest.approx(4 * d, rel=1e-6, abs=1e-6 * size)


def test_moments_are_kept(tmp_path: Path, monkeypatch):
    found = Moments.of(torch.randn(20, 4))
    found.save(tmp_path / "m.safetensors")
    monkeypatch.setattr(classifiers, "MOMENTS", tmp_path / "m.safetensors")
    back = Moments.embedded()
    torch.testing.assert_close(back.mean, found.mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(back.covariance, found.covariance, rtol=1e-6, atol=1e-6)
    assert back.n == 20


def test_nearest_finds_copies_and_their_mirror_images():
    real = torch.rand(30, 3, 8, 8)
    images = torch.stack([real[4], real[7].flip(2), real[2] + 0.1])
    found = pixels.nearest(images, real, batch=7)
    torch.testing.assert_close(found, torch.tensor([0.0, 0.0, 0.1]), rtol=0, atol=2e-3)  # cdist: float32's root
    assert float(pixels.nearest(torch.rand(1, 3, 8, 8), real)) > 0.2


def test_a_class_is_a_reward():
    """Its gradient climbs to it; a wrong name says which there are."""
    reward = reward_of("cifar10-class=ship")
    x = torch.rand(2, 3, 32, 32, requires_grad=True)
    before = reward(x, ["", ""], [{}, {}])
    (slope,) = torch.autograd.grad(before.sum(), x)
    after = reward((x + 0.02 * slope.sign()).clamp(0, 1), ["", ""], [{}, {}])
    assert bool((after > before).all()) and bool((before < 0).all())
    for text in ("cifar10-class", "cifar10-class=boat"):
        with pytest.raises(ValueError, match=r"cifar10-class needs a class.*ship"):
            reward_of(text)
