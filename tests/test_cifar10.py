"""scale/cifar10.py: a run from its command to a pipeline that diffusers loads, pretraining, and what it refuses."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import load_file
from test_sd15 import drawn_by_the_card

from benchmarks import cifar10 as forms
from ctrl import DDIM
from ctrl.algorithms import DDPO
from ctrl.fit import Settings as FitSettings
from ctrl.fit import fit
from ctrl.training import files
from scale import cifar10, pixels
from scale.cifar10 import Evaluate, Sample, Settings, energy_of, evaluate_run, export, main, sample, train
from scale.diffusion import Score, pictures_of
from scale.evaluate import SEED
from scale.recipes.pretrain import Pretrain, batch_of, factor, loss_of, pretrain
from scale.settings import Settings as StableDiffusion
from scale.tuning import Export
from toy import catalogue
from toy.networks import Policy


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Untrained, of 8 x 8 pictures."""
    path = tmp_path_factory.mktemp("cifar10") / "model"
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=8,
        attention_head_dim=8, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    noising = DDPMScheduler(variance_type="fixed_small", prediction_type="v_prediction", timestep_spacing="trailing")
    DDPMPipeline(unet, noising).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of 8 x 8 pictures."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("data")
    for i, pixels_ in enumerate(np.random.default_rng(0).integers(0, 256, (24, 8, 8, 3), np.uint8)):
        Image.fromarray(pixels_).save(folder / f"{i}.png")
    return folder


@pytest.fixture(autouse=True)
def float32():
    """And accelerate, which has one precision a process, begins anew."""
    torch.set_default_dtype(torch.float32)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def short(folder, run, **changes):
    """Two epochs of four pictures."""
    plain = {
        "model": str(folder), "reward": "cifar10-class=ship", "epochs": 2, "samples": 4, "steps": 4, "lr": 1e-3,
        "batch": 64, "micro_batch": 64, "out": run, "eval_samples": 6, "eval_grid_samples": 4,
        "eval_samplers": ("ddim",), "eval_steps": (5,), "critic_width": 8, "pictures_every": 1,
        "options": ("nodes=8", "critic_updates=1", "actor_updates=1", "keep=1"),
    }  # fmt: skip
    return Settings(**{**plain, **changes})


@pytest.fixture(scope="module")
def run(model, pictures, tmp_path_factory):
    """A run on the energy, and its outcome."""
    torch.set_default_dtype(torch.float32)
    return train(short(model, tmp_path_factory.mktemp("runs") / "run", reward="energy", data=pictures))


def test_decided_grows_along_the_path_and_refuses_the_energy(model, pictures, tmp_path):
    """The log-probability of a class, decided at the last state more than at the first."""
    s = short(model, tmp_path / "run", eval_samples=8)
    rows = json.loads((cifar10.measure_decided(s) / "decided.json").read_text())["rows"]
    assert [row["step"] for row in rows] == [0, 1, 2, 3] and rows[-1]["share"] > rows[0]["share"]
    with pytest.raises(ValueError, match="decided does not support reward = energy"):
        cifar10.measure_decided(short(model, tmp_path / "other", reward="energy", data=pictures))
    assert not (tmp_path / "other").exists()


def test_a_run_leaves_a_pipeline_that_draws_what_was_evaluated(run):
    """By diffusers' own call."""
    alone = DDPMPipeline.from_pretrained(run.out / "pipeline").to(run.pipeline.device)
    alone.set_progress_bar_config(disable=True)
    rngs = [pixels.generator(pixels.SEED, i) for i in range(6)]
    shown = alone(batch_size=6, generator=rngs, num_inference_steps=4, output_type="np").images
    drawn = pixels.draw(run.pipeline, range(6), "dpmsolver++", 4)
    assert torch.equal(drawn, torch.from_numpy(shown).permute(0, 3, 1, 2))
    assert torch.equal(
        pixels.draw(alone, range(6), "ancestral", 4), pixels.draw(run.pipeline, range(6), "ancestral", 4)
    )
    found = json.loads((run.out / "evaluation.json").read_text())
    assert found["path_kl"] > 0 and found["gain_se"] > 0 and found["samples"] == 6
    assert set(found["untuned"]) == set(pixels.SAMPLERS)
    assert found["reward_best_untuned"] == max(row["reward"] for row in found["untuned"].values())
    assert found["gain"] == pytest.approx(found["reward_after"] - found["reward_best_untuned"], abs=1e-6)
    assert found["frechet_best_untuned"] == min(row["frechet"] for row in found["untuned"].values())
    assert sum(found["classes_after"]) == pytest.approx(1) and found["nearest_after"] > 0
    assert found["fid_after"] is None  # no Inception network
    assert [(row["sampler"], row["steps"]) for row in found["grid"]] == [("ddim", 5)]


def test_the_energy_is_learned_and_kept(run, model, pictures):
    """It moves, the policy moves, and a checkpoint has it."""
    (folder, *_) = sorted((run.out / "checkpoints").iterdir())
    states = sorted(f.name for f in folder.glob("*.safetensors"))
    assert "reward.safetensors" in states
    torch.manual_seed(0)
    first = energy_of(Settings.read(run.out / "config.json"), 8).state_dict()
    learned = load_file(folder / "reward.safetensors")
    assert set(first) == set(learned)
    assert all(not torch.equal(v, learned[name]) for name, v in first.items())
    untuned = pixels.load(str(model)).unet.state_dict()
    assert any(not torch.equal(v.cpu(), untuned[k]) for k, v in run.pipeline.unet.state_dict().items())
    assert all("reward_loss" in epoch for epoch in run.history)


def test_what_a_run_leaves_besides(run):
    assert Settings.read(run.out / "config.json").reward == "energy"
    assert [f.name for f in sorted((run.out / "pictures").iterdir())] == [f"epoch-{n:06d}.png" for n in range(3)]
    assert (run.out / "report.html").stat().st_size > 1e4
    card = (run.out / "pipeline" / "README.md").read_text()
    assert "DDPMPipeline" in card and run.evaluation.summary() in card


@pytest.mark.long
def test_the_card_draws(run):
    assert drawn_by_the_card(run.out, run.out / "pipeline" / "README.md") == ["8", "8"]


@pytest.mark.parametrize(
    "changes",
    [
        {"algorithm": "td-form", "options": ("nodes=8", "evaluation.critic_updates=1")},
        {"algorithm": "next-value", "options": ("nodes=8", "evaluation.critic_updates=1")},
        {"algorithm": "ddpo", "options": ("nodes=8",)},
        {"algorithm": "adjoint-matching", "options": ("nodes=8", "updates=1"), "ema": 0.5},
        {"critic": "structured", "solver": "2m", "grid": "log-snr", "jitter": 0.3, "precision": "bf16"},
        {"reward": "jpeg-compressibility", "critic": "structured", "pretrain": 1},
        {"solver": "diffusers/dpmsolver++", "gradient_checkpointing": True},
    ],
    ids=lambda changes: changes.get("algorithm") or changes.get("solver") or changes["reward"],
)  # fmt: skip
def test_every_form_trains(model, tmp_path, changes):
    outcome = train(short(model, tmp_path / "run", epochs=1, eval_steps=(), **changes))
    assert outcome.history[-1]["policy_grad_norm"] > 0


@pytest.mark.filterwarnings("ignore:checkpoint .*epoch-000002 is passed over")
def test_a_run_that_is_gone_on_with_is_the_run(run, model, pictures, tmp_path):
    """The energy's weights and Adam's moments included."""
    s = short(model, tmp_path / "run", reward="energy", data=pictures, checkpoint_every=1)
    halted = RuntimeError("halted")

    def halt(pipeline, *rest):
        raise halted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cifar10, "save", halt)
        with pytest.raises(RuntimeError, match="halted"):
            train(s)
    newest = max((tmp_path / "run" / "checkpoints").iterdir())
    (newest / files.MANIFEST).unlink()  # a crash in the middle of it: epoch 1 serves
    AcceleratorState._reset_state(reset_partial_state=True)
    resumed = train(dataclasses.replace(s, resume=True))
    for name, v in run.pipeline.unet.state_dict().items():
        assert torch.equal(v, resumed.pipeline.unet.state_dict()[name]), name
    assert resumed.history[-1]["reward"] == run.history[-1]["reward"]


def test_sample_evaluate_and_export(run, tmp_path, capsys):
    out = sample(Sample(run=run.out, n=3, out=tmp_path / "drawn"))
    assert sorted(f.name for f in out.iterdir()) == ["0000.png", "0001.png", "0002.png", "grid.png"]
    with pytest.raises(ValueError, match="the energy of a run is not kept"):
        evaluate_run(Evaluate(run=run.out))
    found = evaluate_run(Evaluate(run=run.out, reward="cifar10-class=cat", samples=5, out=tmp_path))
    assert found.samples == 5 and (tmp_path / "evaluation.json").is_file()
    before = load_file(run.out / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")
    export(Export(run=run.out, epoch=2))
    after = load_file(run.out / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(v, after[k]) for k, v in before.items())


def redness(images, prompts, metadata):
    """A reward of one's own."""
    return images[:, 0].mean((1, 2))


def test_a_reward_of_ones_own_is_recorded_by_its_name(model, tmp_path):
    """In settings, report and card; an evaluation asks for it, and takes its name or itself."""
    found = train(short(model, tmp_path / "run", epochs=1, eval_steps=()), reward=redness)
    name = f"{__name__}:redness"
    assert json.loads((tmp_path / "run" / "config.json").read_text())["reward"] == name
    assert f"tuned on {name}" in (tmp_path / "run" / "report.html").read_text()
    assert f"# Tuned on {name}" in (tmp_path / "run" / "pipeline" / "README.md").read_text()
    with pytest.raises(ValueError, match=f"reward: '{name}' of .* is not built in, .*: pass --reward module:function"):
        evaluate_run(Evaluate(tmp_path / "run"))
    gains = [
        evaluate_run(Evaluate(tmp_path / "run", **named), *given).gain
        for named, given in (({"reward": name}, ()), ({}, (redness,)))
    ]
    assert gains == pytest.approx([found.evaluation.gain] * 2, abs=1e-6)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"reward": "energy"}, "data must be given for reward energy"),
        ({"download": True}, "data must be given with download"),
        ({"steps": 3}, "steps must be at least 4"),
        ({"eval_samplers": ("heun",)}, "eval_sampler must be one of ancestral, ddim"),
        ({"eval_sampler": "unipc"}, "eval_sampler must be another than unipc"),
        ({"energy_updates": 0}, "energy_updates must be >= 1"),
    ],
)
def test_wrong_settings_say_so(model, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        short(model, tmp_path, **changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"steps": 1001}, "steps must be at most the model's 1000 timesteps"),
        ({"reward": "cifar10-class=boat"}, "cifar10-class needs a class"),
        ({"reward": "nosuch"}, "nosuch"),
        ({"reward": "energy", "options": ("keep=2",)}, "must keep one epoch"),
        ({"steps": 700, "grid": "timesteps"}, "end above timestep 0"),
        ({"algorithm": "td-form", "options": ("evaluation.actor_updates=1",)}, "as it only fits the critic"),
        ({"fid_weights": "nowhere.pth"}, "there is no file nowhere.pth"),
        ({"reward": "jpeg-compressibility", "algorithm": "adjoint-matching", "options": ()}, "has no gradient"),
        ({"model": "nobody/nothing"}, "could not be loaded"),
        ({"solver": "heun", "algorithm": "next-value", "options": ()}, "no transition density, which NextValue needs"),
        ({"solver": "diffusers/ddim", "algorithm": "td-form", "options": ()}, "transition density, which TDForm needs"),
        ({"data": "nowhere"}, "nowhere"),
    ],
)
def test_wrong_tasks_say_so(model, pictures, tmp_path, monkeypatch, changes, message):
    """By a dry run, and by a run before it loads weights or makes a folder."""
    monkeypatch.setattr(DDPMPipeline, "from_pretrained", None)
    s = short(model, tmp_path / "run", **{"data": pictures, **changes})
    for work in (train, cifar10.dry_run):
        with pytest.raises(ValueError, match=message):
            work(s)
    assert not (tmp_path / "run").exists()


def test_the_command_has_defaults_of_its_own():
    """Of small images many are drawn at a time."""
    s, sd = Settings(), StableDiffusion()
    assert (s.samples, s.batch, s.micro_batch) == (256, 256, 128) and (sd.batch, sd.micro_batch) == (8, 4)


def test_pictures_of_another_size_are_refused(model, tmp_path):
    from PIL import Image

    (tmp_path / "d").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "d" / "a.png")
    with pytest.raises(ValueError, match=r"are 9 x 9, those of .* 8 x 8"):
        train(short(model, tmp_path / "run", data=tmp_path / "d"))


def test_a_dry_run_says_what_it_would_need(model, tmp_path, capsys):
    main(["--model", str(model), "--dry-run", "--out", str(tmp_path / "run")])
    said = capsys.readouterr().out
    assert "grid: log-snr" in said and "network calls per epoch: " in said and not (tmp_path / "run").exists()


def test_data_are_drawn_by_sample(model, pictures):
    """The same for an id whatever its company, all of them in turn, half of them flipped, noised as samples are."""
    s, score = short(model, "runs", data=pictures, reward="energy"), Score.of(pixels.load(str(model)))
    held = cifar10.data.read(pictures)
    of, ids = cifar10.drawn_data(s, score, held), torch.arange(400)
    found = of(ids)
    assert torch.equal(of(ids[7:9]), found[7:9])
    plain = held.batch(torch.arange(24))
    both = torch.stack([plain, plain.flip(3)])
    away = (found[:, None, None] - both).square().mean((3, 4, 5))  # (400, 2, 24)
    which = away.flatten(1).argmin(1)
    assert set((which % 24).tolist()) == set(range(24))
    assert abs(int((which >= 24).sum()) - 200) < 50  # five standard deviations
    sigma = float(score.noising.sigma(torch.tensor(score.s_min)))
    assert away.flatten(1).amin(1).mean().sqrt().item() == pytest.approx(sigma, rel=0.05)


def test_the_energy_needs_no_options(model, pictures, tmp_path):
    """Whatever the algorithm keeps by default, it keeps one epoch beside a reward that is learned."""
    for algorithm in ("actor-critic", "path-consistency"):
        s = short(model, tmp_path, data=pictures, reward="energy", algorithm=algorithm, options=())
        task = cifar10.assemble(s, None, Accelerator())
        assert task.algorithm.keep == 1


def test_another_seed_draws_other_pictures(run):
    one, two = (pixels.draw(run.pipeline, range(6), "ddim", 4, seed=seed) for seed in (0, 1))
    assert not any(torch.equal(a, b) for a in one for b in two)


# ------------------------------------------------------------------------------------------ pretraining


def small(pictures, out, **changes):
    """A few steps."""
    plain = {"data": pictures, "out": out, "channels": (8, 16), "attention_at": 4, "steps": 6, "batch": 8,
             "checkpoint_every": 3}  # fmt: skip
    return Pretrain(**{**plain, **changes})


def test_a_model_is_pretrained_and_gone_on_with(pictures, tmp_path):
    """What comes out loads in diffusers' own pipeline; an interrupted run is the run."""
    whole = pretrain(small(pictures, tmp_path / "whole"))
    s = small(pictures, tmp_path / "parts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("scale.recipes.pretrain.batch_of", lambda p, s, step: batch_of(p, s, step) if step < 4 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pretrain(s)
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(ValueError, match="is there already"):
        pretrain(s)
    for changes, message in (({"lr": 1.0}, "lr is 1.0, and was"), ({"out": tmp_path / "no"}, "has no checkpoint")):
        with pytest.raises(ValueError, match=message):
            pretrain(dataclasses.replace(s, resume=True, **changes))
    parts = pretrain(dataclasses.replace(s, resume=True))
    for name, v in whole.unet.state_dict().items():
        assert torch.equal(v, parts.unet.state_dict()[name]), name
    last, again = (load_file(tmp_path / run / "checkpoint" / "model.safetensors") for run in ("whole", "parts"))
    assert all(torch.equal(v, again[k]) for k, v in last.items())  # to the last bit of float32
    assert json.loads((tmp_path / "whole" / "recipe.json").read_text())["recipe"]["steps"] == 6
    pixels.load(str(tmp_path / "whole"))
    own = DDPMPipeline.from_pretrained(tmp_path / "whole")
    own.set_progress_bar_config(disable=True)
    assert own(batch_size=2, num_inference_steps=3, output_type="np").images.shape == (2, 8, 8, 3)


def test_the_loss_is_min_snr_of_v():
    """Of a model that says v = 0: its expectation is the mean of min(snr, 5)/(snr + 1), for data and noise of unit
    variance; of the truth, none."""
    kept = DDPMScheduler(num_train_timesteps=50).alphas_cumprod.double()
    rng = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(5000, 3, 2, 2, generator=rng, dtype=torch.float64) for _ in range(2))
    times = torch.arange(5000) // 100
    found = loss_of(lambda x, k, return_dict: (torch.zeros_like(x),), kept, x0, times, noise)
    snr = kept / (1 - kept)
    assert float(found.mean()) == pytest.approx(
        float((snr.clamp(max=5) / (snr + 1)).mean()), abs=5 * float(found.std()) / 5000**0.5
    )

    def truth(x, k, return_dict):
        a, s = kept[k].sqrt()[:, None, None, None], (1 - kept[k]).sqrt()[:, None, None, None]
        return (a * noise - s * (x - s * noise) / a,)

    assert float(loss_of(truth, kept, x0, times, noise).abs().max()) < 1e-9


def test_the_learning_rate_rises_stays_and_falls():
    rate = factor(1000)
    assert rate(0) == pytest.approx(0.05) and rate(19) == 1 == rate(800)
    assert rate(900) == pytest.approx(0.5) and rate(999) == pytest.approx(0.005)


@pytest.mark.parametrize(
    "changes, message",
    [({"channels": (8, 12)}, "multiples of 8"), ({"steps": 0}, "steps must be >= 1"), ({"ema": 1.0}, "ema must be")],
)
def test_wrong_recipes_say_so(pictures, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        small(pictures, tmp_path, **changes)


def test_a_picture_that_cannot_be_halved_is_refused(pictures, tmp_path):
    with pytest.raises(ValueError, match="cannot be halved 4 times"):
        pretrain(small(pictures, tmp_path / "m", channels=(8,) * 5))


def test_the_forms_are_judged_by_the_sampler_that_is_trained():
    """The first batch of judged pictures is an epoch of training with the same seed: its ids, its jittered steps."""
    entry = catalogue.get("gaussian-1d")
    policy, ends = Policy(entry.problem), []
    settings = FitSettings(epochs=1, samples=4, steps=6, solver=DDIM(), seed=SEED, lr=1e-9, progress=False)
    fit(
        entry.problem, policy, DDPO(passes=1, nodes=8), settings=settings,
        callbacks=[lambda run, metrics: ends.append(run.replay.collections[-1].trajectory.x[-1])],
    )  # fmt: skip
    task = SimpleNamespace(problem=entry.problem, policy=policy, fit=settings)
    found = forms.sampled(task, SimpleNamespace(batch=4), 10)
    assert len(found) == 10
    torch.testing.assert_close(found[:4], pictures_of(None, ends[0]), rtol=0, atol=1e-6)  # an update of 1e-9 in between
    still = SimpleNamespace(problem=entry.problem, policy=policy, fit=dataclasses.replace(settings, jitter=0.0))
    assert not torch.allclose(found, forms.sampled(still, SimpleNamespace(batch=4), 10), atol=1e-3)
