"""scale/sd15.py: a run from its command to a pipeline that diffusers loads, and what it refuses."""

import ast
import dataclasses
import gc
import html.parser
import json
import re
import shutil
import subprocess
import sys
import warnings
import weakref
from itertools import product
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPConfig, CLIPImageProcessorPil

from ctrl.algorithms import KLBudget
from ctrl.fit import fit
from ctrl.training.device import is_cpu
from ctrl.training.lock import FILE
from scale import finetune, models, tuning
from scale.evaluate import draw
from scale.finetune import Evaluate, Export, Sample, evaluate_run, export, sample, settings_of, train
from scale.prompts import Prompt, read
from scale.recipes import make_tiny_sd
from scale.recipes.make_tiny_sd import Recipe, untrained
from scale.rewards import reward_of
from scale.sd15 import main
from scale.settings import ASSETS, EMBEDDED, Settings
from scale.shapes import judge, parse
from scale.tuning import algorithm_of, learn
from tests.processes import member, several

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The embedded model's parts, untrained, as files in half precision."""
    path = tmp_path_factory.mktemp("sd15") / "model"
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    untrained().to(torch.float16).save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def float32(monkeypatch):
    """And accelerate, which has one precision a process, begins anew."""
    torch.set_default_dtype(torch.float32)
    monkeypatch.setattr(finetune.Watch, "STEPS", 2)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def short(model, run, /, **changes):
    """Two epochs of four pictures."""
    plain = {
        "model": str(model), "reward": "following-soft", "other_reward": "jpeg-compressibility",
        "prompts": "shapes-doubtful-more", "eval_prompts": "shapes-doubtful", "epochs": 2, "samples": 4, "steps": 3,
        "guidance": 2.0, "lr": 1e-3, "batch": 64, "micro_batch": 64, "out": run, "eval_samples": 4,
        "eval_headline": 5, "eval_grid_samples": 2, "eval_samplers": ("euler",), "eval_steps": (3,),
        "critic_width": 8, "pictures_every": 1, "algorithm": "actor-critic",
        "options": ("nodes=8", "critic_updates=1", "actor_updates=1"),
    }  # fmt: skip
    return Settings(**{**plain, **changes})


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    """A run, and its outcome."""
    torch.set_default_dtype(torch.float32)
    return train(short(model, tmp_path_factory.mktemp("runs") / "run"))  # with pictures as they are for users


def test_a_run_leaves_a_pipeline_that_draws_what_was_evaluated(run, model):
    """By diffusers alone; and it is not the model it came from."""
    alone = StableDiffusionPipeline.from_pretrained(run.out / "pipeline").to(run.pipeline.device)
    alone.set_progress_bar_config(disable=True)
    prompts = read("shapes-doubtful")
    drawn = draw(alone, prompts, range(4), "dpmsolver++", 5, 2.0, 64)
    again = draw(run.pipeline, prompts, range(4), "dpmsolver++", 5, 2.0, 64)
    assert torch.equal(drawn.images, again.images)
    found = json.loads((run.out / "evaluation.json").read_text())
    rewarded = reward_of("following-soft")(drawn.images, [p.text for p in drawn.prompts], [])
    assert found["reward_after"] == pytest.approx(float(rewarded.mean()), rel=1e-5)
    assert found["path_kl"] > 0 and found["gain_se"] > 0 and 0.8 < found["ceiling"] < 1
    assert [(row["sampler"], row["steps"]) for row in found["grid"]] == [("euler", 3)]
    assert type(alone.scheduler).__name__ == "PNDMScheduler"  # the model's own


def test_a_run_leaves_its_settings_metrics_pictures_and_events(run):
    s = Settings.read(run.out / "config.json")
    assert (s.options[0], s.eval_samplers, s.out) == ("nodes=8", ("euler",), run.out)
    assert dataclasses.replace(s).plain() == json.loads((run.out / "config.json").read_text())
    metrics = [json.loads(line) for line in (run.out / "metrics.jsonl").read_text().splitlines()]
    assert [m["trajectories"] for m in metrics] == [4, 8] and metrics == run.history
    assert [f.name for f in sorted((run.out / "pictures").iterdir())] == [f"epoch-{n:06d}.png" for n in range(3)]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = (run.out / "sd15").glob("events.*")
    seen = EventAccumulator(str(events)).Reload()
    assert [e.value for e in seen.Scalars("reward")] == pytest.approx([m["reward"] for m in metrics])
    assert len(seen.Images("pictures")) == 3


def test_the_report_needs_no_other_file(run):
    sources = []

    class Reader(html.parser.HTMLParser):
        def handle_starttag(self, tag, attributes):
            sources.extend(v for k, v in attributes if k in ("src", "href"))

    Reader().feed((run.out / "report.html").read_text())
    assert len(sources) == 4 and all(s.startswith("data:image/png;base64,") for s in sources)


def block_of(card):
    """The Python that a model card shows."""
    (found,) = re.findall(r"```python\n(.*?)```", card.read_text(), re.DOTALL)
    return found


def drawn_by_the_card(out, card):
    """The size of the image that the Python of a model card draws, in a process that has nothing of this project."""
    alone = "import sys; assert not {'ctrl', 'scale'} & {*sys.modules}; print(*image.size)"
    command = [sys.executable, "-I", "-c", f"{block_of(card)}\n{alone}"]
    return subprocess.run(command, cwd=out, capture_output=True, text=True, check=True).stdout.split()


def test_the_card_names_its_base_and_quotes_its_prompt(run, model, tmp_path):
    _, head, body = (run.out / "pipeline" / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(head)["base_model"] == str(model)
    assert run.evaluation.summary() in body
    (tmp_path / "pipeline").mkdir()
    s = dataclasses.replace(Settings.read(run.out / "config.json"), out=tmp_path)
    finetune.card(s, run.pipeline, Prompt('a "red" fox\n'), run.evaluation)
    ast.parse(block_of(tmp_path / "pipeline" / "README.md"))


def test_weights_can_be_read_by_everyone(run, adapted):
    files = [*(run.out / "pipeline").rglob("*.safetensors"), *(adapted.out / "lora").rglob("*.safetensors")]
    assert len(files) == 4 and {file.stat().st_mode & 0o777 for file in files} == {0o644}


def test_a_run_is_evaluated_and_sampled_again(run, tmp_path):
    again = evaluate_run(Evaluate(run.out, samples=4, out=tmp_path))
    found = run.evaluation
    assert (again.gain, again.path_kl) == pytest.approx((found.gain, found.path_kl), rel=1e-5, abs=1e-6)
    assert json.loads((tmp_path / "evaluation.json").read_text())["gain"] == again.gain
    out = sample(Sample(run.out, prompts="a red circle on a white ground", n=2, steps=3))
    assert sorted(f.name for f in out.iterdir()) == ["0000.png", "0001.png", "grid.png"]


def test_a_stopped_run_goes_on(model, tmp_path):
    """To the same end as one that was not stopped."""
    whole = train(short(model, tmp_path / "whole", epochs=2, checkpoint_every=1))
    (tmp_path / "whole" / "checkpoints" / "epoch-000002").rename(tmp_path / "later")
    before = (tmp_path / "whole" / "config.json").read_text()
    with pytest.raises(ValueError, match="go on with --resume, --overwrite it, or take another folder"):
        train(short(model, tmp_path / "whole", epochs=2, beta=0.2))
    assert (tmp_path / "whole" / "config.json").read_text() == before
    with pytest.raises(ValueError, match=r"beta is 0\.2, and was 0\.1 in"):
        train(short(model, tmp_path / "whole", epochs=2, beta=0.2, resume=True))
    again = train(short(model, tmp_path / "whole", epochs=2, checkpoint_every=1, resume=True))
    for p, q in zip(whole.pipeline.unet.parameters(), again.pipeline.unet.parameters(), strict=True):
        assert torch.equal(p, q)
    folder = export(Export(tmp_path / "whole", epoch=1))
    exported = StableDiffusionPipeline.from_pretrained(tmp_path / "whole" / "pipeline").unet.state_dict()
    held = load_file(folder / "policy.safetensors")
    assert folder.name == "epoch-000001" and all(torch.equal(v, held[f"network.{k}"]) for k, v in exported.items())
    lines = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    merits = [m["reward"] - 0.1 * m["kl"] for m in map(json.loads, lines)]
    assert export(Export(tmp_path / "whole")).name == f"epoch-{1 + merits.index(max(merits)):06d}"
    with pytest.raises(ValueError, match=r"epoch must be that of a checkpoint in .*: 2, 1"):
        export(Export(tmp_path / "whole", epoch=7))


def test_a_run_holds_its_folder_from_before_the_model_is_loaded_to_after_the_evaluation(model, tmp_path, monkeypatch):
    """The critic's own epochs included."""
    held = []

    def watched(part, name):
        before = getattr(part, name)

        def work(*arguments, **options):
            held.append((name, (tmp_path / "run" / FILE).exists()))
            return before(*arguments, **options)

        monkeypatch.setattr(part, name, work)

    for part, name in ((models, "load"), (tuning, "pretrain"), (tuning, "fit"), (finetune, "evaluate")):
        watched(part, name)
    train(short(model, tmp_path / "run", epochs=1, pretrain=1, eval_samples=2, eval_steps=()))
    assert [name for name, _ in held] == ["load", "pretrain", "fit", "fit", "evaluate"]
    assert all(there for _, there in held) and not (tmp_path / "run" / FILE).exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"algorithm": "ddpo", "solver": "ddim", "in_a_row": 2, "options": ("group=2", "nodes=8"), "beta": 0.0},
        pytest.param(
            {"algorithm": "ppo", "options": ("updates=1", "nodes=8", "evaluation.critic_updates=1")},
            marks=pytest.mark.long,
        ),
        {"algorithm": "adjoint-matching", "options": ("updates=1", "nodes=8")},
        {"algorithm": "forward-matching", "options": ("updates=1", "nodes=8"), "reward": "jpeg-compressibility"},
        pytest.param({"algorithm": "awm", "options": ("updates=1", "nodes=8")}, marks=pytest.mark.long),
        pytest.param({"algorithm": "diffusion-nft", "options": ("updates=1", "nodes=8")}, marks=pytest.mark.long),
        pytest.param(
            {"algorithm": "td-form", "options": ("nodes=8", "evaluation.critic_updates=1", "evaluation.nodes=8")},
            marks=pytest.mark.long,
        ),
        pytest.param(
            {"algorithm": "next-value", "options": ("nodes=8", "evaluation.critic_updates=1", "evaluation.nodes=8")},
            marks=pytest.mark.long,
        ),
        {"reward": "jpeg-compressibility", "pretrain": 1},
        pytest.param(
            {
                "algorithm": "q-learning",
                "gamma": 1e-4,
                "ema": 0.5,
                "options": ("q_updates=1", "critic_updates=1", "nodes=8"),
            },
            marks=pytest.mark.long,
        ),
        pytest.param({"critic": "network", "kl": 2.0}, marks=pytest.mark.long),
        {"solver": "diffusers/dpmsolver++"},
        pytest.param({"solver": "diffusers/sde-dpmsolver++"}, marks=pytest.mark.long),
        {"gradient_checkpointing": True, "ema": 0.5, "precision": "bf16"},
        pytest.param({"offload_reference": True, "channels_last": True, "log_with": "none"}, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_every_option_trains(model, tmp_path, changes):
    before = StableDiffusionPipeline.from_pretrained(model).unet.state_dict()
    found = train(short(model, tmp_path / "run", epochs=1, eval_samples=2, eval_steps=(), pictures_every=0, **changes))
    after = found.pipeline.unet.state_dict()
    assert any(not torch.equal(before[k].float(), v.cpu()) for k, v in after.items())
    assert found.evaluation.path_kl > 0 and found.evaluation.grid == []


@pytest.fixture(scope="module")
def adapted(model, tmp_path_factory):
    """A run with adapters, and its outcome."""
    pytest.importorskip("peft")
    torch.set_default_dtype(torch.float32)
    return train(short(model, tmp_path_factory.mktemp("runs") / "adapted", lora=2, eval_steps=(), pictures_every=0))


@pytest.mark.long
def test_cards_draw(run, adapted):
    assert drawn_by_the_card(run.out, run.out / "pipeline" / "README.md") == ["32", "32"]
    assert drawn_by_the_card(adapted.out, adapted.out / "lora" / "README.md") == ["32", "32"]


def test_adapters_alone_are_trained_and_kept(adapted, model, tmp_path):
    assert adapted.evaluation.path_kl > 0
    alone = StableDiffusionPipeline.from_pretrained(model).to(torch.float32)
    alone.set_progress_bar_config(disable=True)
    prompts = [Prompt("a red circle on a white ground")]
    plain = draw(alone, prompts, range(2), "ddim", 5, 2.0)
    alone.load_lora_weights(adapted.out / "lora")
    tuned = draw(alone, prompts, range(2), "ddim", 5, 2.0)
    torch.testing.assert_close(tuned.images, draw(adapted.pipeline, prompts, range(2), "ddim", 5, 2.0).images)
    assert not torch.allclose(plain.images, tuned.images, atol=1e-4)
    again = evaluate_run(Evaluate(adapted.out, out=tmp_path))
    assert again.gain == pytest.approx(adapted.evaluation.gain, abs=1e-5)


CHANGES = {
    "batch": 3, "channels_last": True, "checkpoint_every": 2, "gradient_checkpointing": True,
    "keep_checkpoints": 1, "log_with": "none", "max_hours": 9.0, "max_kl": 1e9, "micro_batch": 3,
    "min_diversity": 0.0, "mismatch": torch.inf, "offload_reference": True, "other_reward": "jpeg-incompressibility",
    "eval": False,
    "patience": 1, "pictures_every": 1, "reward_python": sys.executable, "reward_retries": 1, "reward_timeout": 60.0,
    "stop_on_collapse": True,
}  # fmt: skip
"""What the free settings of a run are changed to; log_with wandb is not tried, which needs an account."""
UNTRIED = {
    "quick": "a trial has a folder of its own",
    "compile": "on a CPU the compilation of two UNets did not end within 20 minutes",
    "dry_run": "nothing is trained", "out": "every case resumes in another folder", "overwrite": "resume excludes it",
    "resume": "every case sets it", "split": "several processes are needed: tests/test_split.py",
}  # fmt: skip
ROUNDED = {"batch", "channels_last", "micro_batch"}
"""Those that change the order of sums."""


@pytest.fixture(scope="module")
def stopped(model, tmp_path_factory):
    """The settings of a run that was stopped after one of two epochs, the folder it left, and what it would have come
    to."""
    folder = tmp_path_factory.mktemp("stopped")
    (folder / "mine.py").write_text("def redness(images, prompts, metadata):\n    return images[:, 0].mean((1, 2))\n")
    torch.set_default_dtype(torch.float32)
    s = short(
        model, folder / "run", reward="mine:redness", checkpoint_every=1, pictures_every=0, eval_samples=2,
        eval_headline=2, eval_steps=(),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # where a reward of one's own is found
        whole = train(s)
    shutil.rmtree(s.out / "checkpoints" / "epoch-000002")
    return s, whole


def test_every_free_setting_is_changed_or_says_why_not():
    assert {*CHANGES, *UNTRIED} == set(Settings.free)


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(Settings.free))
def test_a_run_goes_on_with_a_free_setting_changed(stopped, tmp_path, monkeypatch, name):
    """To the end that it would have had without. Where sums are in another order, to rounding: so is the next epoch's
    reward, while Adam's step, of about the learning rate whatever the size of a gradient, may have either sign."""
    if name in UNTRIED:
        pytest.skip(UNTRIED[name])
    s, whole = stopped
    monkeypatch.chdir(s.out.parent)
    shutil.copytree(s.out, tmp_path / "run")
    again = train(dataclasses.replace(s, resume=True, out=tmp_path / "run", **{name: CHANGES[name]}))
    before, after = ([{k: v for k, v in m.items() if k != "seconds"} for m in run.history] for run in (whole, again))
    weights = [run.pipeline.unet.state_dict().values() for run in (whole, again)]
    if name not in ROUNDED:
        assert after == before and all(map(torch.equal, *weights))
        return
    assert after[0] == before[0] and after[1]["reward"] == pytest.approx(before[1]["reward"], rel=1e-4)
    assert max(float((a - b).abs().max()) for a, b in zip(*weights, strict=True)) < 2 * s.lr


def test_a_stopped_run_with_adapters_goes_on(model, tmp_path):
    """To the same end as one that was not stopped, from a checkpoint of the adapters, their moments and their average,
    which can be exported."""
    given = short(model, tmp_path / "run", lora=2, ema=0.5, checkpoint_every=1, eval_steps=(), log_with="none")
    whole = train(given).pipeline.unet.state_dict()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "epoch-000002")
    again = train(dataclasses.replace(given, resume=True)).pipeline.unet
    trained = {f"network.{name}": p for name, p in again.named_parameters() if p.requires_grad}
    assert all(torch.equal(whole[name.removeprefix("network.")], p) for name, p in trained.items())
    folder = export(Export(tmp_path / "run", epoch=1))
    held = [load_file(folder / file) for file in ("policy.safetensors", "ema.safetensors")]
    assert {*held[0]} == {*held[1]} == {*trained}
    exported = load_file(tmp_path / "run" / "lora" / "pytorch_lora_weights.safetensors")
    assert sorted(float(v.norm()) for v in exported.values()) == sorted(float(v.norm()) for v in held[1].values())


def first_weights(model, tmp_path, **changes):
    """Of the adapters and the critic, in one vector, after the process has drawn for other reasons."""
    torch.seed()
    task = finetune.assemble(short(model, tmp_path, **changes), None, Accelerator())
    parameters = [p for m in (task.policy, task.critic) for p in m.parameters() if p.requires_grad]
    return torch.cat([p.detach().cpu().flatten() for p in parameters])


@pytest.mark.parametrize("changes", [{"lora": 2}, {"lora": 2, "critic": "structured", "reward": "following"}], ids=str)
def test_the_seed_fixes_all_first_weights(model, tmp_path, changes):
    first, again, other = (first_weights(model, tmp_path, seed=seed, **changes) for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)


def trained(model, out):
    """A run's trained weights, and its metrics but for the time they took; in float64, and by plain gradient descent:
    Adam divides by the sizes of gradients, and so magnifies the rounding of small ones."""
    torch.set_default_dtype(torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "load", lambda *a, load=models.load, **k: load(*a, **k).to(torch.float64))
        s, accelerator = short(model, out, samples=2, steps=2, lora=2, lr=0.1, critic_lr=0.1), Accelerator()
        task = finetune.assemble(s, None, accelerator)
    descent = dataclasses.replace(task, fit=dataclasses.replace(task.fit, optimizer=torch.optim.SGD))
    history = learn(s, descent, accelerator)
    weights = [p for m in (task.learner, task.critic) for p in m.parameters() if p.requires_grad]
    return {
        "weights": torch.cat([p.detach().flatten() for p in weights]),
        "history": [{name: v for name, v in metrics.items() if name != "seconds"} for metrics in history],
    }


def worker(model, folder, rank, world):
    """One process of several: what it has at the end goes to a file."""
    with member(folder, rank, world):
        torch.save(trained(model, f"{folder}/run"), f"{folder}/{rank}.pt")


@pytest.mark.long
def test_adapters_on_two_processes_are_those_of_one(model, tmp_path):
    """Weights and metrics, to rounding; and both processes end with the same."""
    with several(2, __file__, model, tmp_path):
        one = trained(model, tmp_path / "alone")
    for rank in range(2):
        run = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(run["weights"], one["weights"], rtol=1e-9, atol=1e-11)
        for x, y in zip(run["history"], one["history"], strict=True):
            assert list(x.values()) == pytest.approx(list(y.values()), rel=1e-9, abs=1e-11)


UPDATES = {
    "actor-critic": ("nodes=4", "critic_updates=1", "actor_updates=1"), "ddpo": ("nodes=4", "passes=1"),
    "adjoint-matching": ("nodes=4", "updates=1"),
}  # fmt: skip


def gradients(folder, **changes):
    """Of an update's loss in the trained weights, and of the reference's sum in x; adapters are not zero."""
    s = short("embedded", folder, samples=2, steps=2, solver="ddim", critic="structured", **changes)
    task = finetune.assemble(s, None, Accelerator())
    for name, p in task.policy.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    settings = dataclasses.replace(task.fit, epochs=1, out=None, progress=False)
    fit(task.problem, task.policy, task.algorithm, critic=task.critic, conditions=task.conditions, settings=settings)
    found = [p.grad for p in task.policy.parameters() if p.requires_grad]
    t, x, ids = (v.to(found[0].device) for v in (torch.tensor([0.3, 0.7]), torch.randn(2, 4, 8, 8), torch.arange(2)))
    x, cond = x.requires_grad_(), task.conditions(ids)
    return found, *torch.autograd.grad(task.problem.reference(t, x, cond).sum(), x)


@pytest.mark.parametrize(
    "lora, algorithm",
    [
        (2, "actor-critic"),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in product((2, 0), UPDATES)
            if case != (2, "actor-critic")
        ),
    ],
)
def test_gradient_checkpointing_changes_nothing(tmp_path, lora, algorithm):
    """Whether a gradient goes through the policy or through the reference, which is the policy's network with its
    adapters off: the same operations, computed twice."""
    given = {"lora": lora, "algorithm": algorithm, "options": UPDATES[algorithm]}
    (plain, plain_x), (again, again_x) = (
        gradients(tmp_path, gradient_checkpointing=checkpointing, **given) for checkpointing in (False, True)
    )
    assert sum(float(g.norm()) for g in plain) > 0 and plain_x.norm() > 0
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True)) and torch.equal(plain_x, again_x)


@pytest.fixture
def checked(model, tmp_path):
    """A model with a safety checker, in half precision."""
    towers = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config=towers, vision_config={**towers, "image_size": 24, "patch_size": 8}, projection_dim=16
    )
    whole = StableDiffusionPipeline(
        **{
            **StableDiffusionPipeline.from_pretrained(model).components,
            "safety_checker": StableDiffusionSafetyChecker(config),
            "feature_extractor": CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size=24),
        }
    )
    whole.to(torch.float16).save_pretrained(tmp_path / "checked")
    return tmp_path / "checked"


def losing(monkeypatch, folder):
    """After training the folder is gone."""
    learn = tuning.learn

    def then_lose(*arguments):
        history = learn(*arguments)
        shutil.rmtree(folder)
        return history

    monkeypatch.setattr(tuning, "learn", then_lose)


def called(folder):
    """A plain pipeline's image, and whether it was checked."""
    alone = StableDiffusionPipeline.from_pretrained(folder)
    alone.set_progress_bar_config(disable=True)
    found = alone("a red circle on a white ground", num_inference_steps=2, output_type="np")
    assert found.images.shape == (1, 32, 32, 3)
    return found.nsfw_content_detected is not None


def test_a_safety_checker_is_saved_though_the_model_is_out_of_reach_by_then(checked, tmp_path, monkeypatch):
    """It was loaded before training."""
    losing(monkeypatch, checked / "safety_checker")
    train(short(checked, tmp_path / "run", epochs=1, eval_samples=2, eval_steps=()))
    assert called(tmp_path / "run" / "pipeline")


@pytest.mark.parametrize("changes", [{}, {"lora": 2}], ids=str)
def test_a_run_ends_whole_though_its_model_is_deleted_in_training(tmp_path, monkeypatch, changes):
    """Nothing of the model's folder is read after the start; a later evaluation needs it, and says so."""
    folder = tmp_path / "model"
    shutil.copytree(ASSETS / "tiny-sd", folder)
    losing(monkeypatch, folder)
    found = train(short(folder, tmp_path / "run", epochs=1, eval_samples=2, eval_steps=(), **changes))
    assert json.loads((found.out / "evaluation.json").read_text())["gain"] == found.evaluation.gain
    assert (found.out / "report.html").is_file()
    if "lora" in changes:
        assert (found.out / "lora" / "pytorch_lora_weights.safetensors").is_file()
    else:
        called(found.out / "pipeline")
        kept = StableDiffusionPipeline.from_pretrained(found.out / "pipeline").unet.state_dict()
        assert all(torch.equal(v.cpu(), kept[name]) for name, v in found.pipeline.unet.state_dict().items())
    with pytest.raises(ValueError, match=f"model: there is no folder {folder}"):
        evaluate_run(Evaluate(found.out))


def test_a_pipeline_is_saved_without_a_safety_checker_that_is_not_there(checked, tmp_path):
    """A warning says so; and so it is exported."""
    shutil.rmtree(checked / "safety_checker")
    for work in (
        lambda: train(short(checked, tmp_path / "run", epochs=1, eval_samples=2, eval_steps=())),
        lambda: export(Export(tmp_path / "run")),
    ):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            work()
        (line,) = (str(w.message) for w in said if issubclass(w.category, UserWarning))
        assert line.startswith(f"model: {checked} is saved without its safety_checker and feature_extractor: Error no")
        assert not called(tmp_path / "run" / "pipeline")
        shutil.rmtree(tmp_path / "run" / "pipeline")


def redness(images, prompts, metadata):
    """A reward of one's own."""
    return images[:, 0].mean((1, 2))


redness.differentiable = True


def test_a_reward_of_ones_own_is_recorded_by_its_name(model, tmp_path):
    """In settings, report and card; an evaluation asks for it, and takes its name or itself."""
    found = train(short(model, tmp_path / "run", epochs=1), reward=redness)
    assert found.evaluation.ceiling is None and found.evaluation.other_before < 0
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


def test_a_run_with_a_reward_of_ones_own_goes_on_with_it_alone(model, tmp_path):
    s = short(model, tmp_path / "run", epochs=1, eval_samples=2, eval_steps=())
    train(s, reward=lambda *given: redness(*given).detach())
    with pytest.raises(ValueError, match=r"reward is '.*:redness', and was '.*<lambda>' in"):
        train(dataclasses.replace(s, resume=True), reward=redness)


def test_a_run_may_name_no_program(run, tmp_path, monkeypatch):
    """A folder may be anybody's: what its config.json names is neither imported nor started."""
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    program.chmod(0o755)
    (tmp_path / "named_by_a_run.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w')\nr = print\n")
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run"
    shutil.copytree(run.out, folder)
    before = json.loads((folder / "config.json").read_text())
    evil = "0.5 * named_by_a_run:r + following"
    for changes in (
        {"reward": evil}, {"other_reward": evil}, {"reward": evil, "reward_python": str(program)},
        {"reward": "imagereward", "reward_python": str(program)},
    ):  # fmt: skip
        (folder / "config.json").write_text(json.dumps({**before, **changes}))
        with pytest.raises(ValueError, match=r"pass --(other-)?reward module:function|give its interpreter as reward_"):
            evaluate_run(Evaluate(folder))
        with pytest.raises(ValueError, match="resume with the same"):
            train(dataclasses.replace(Settings.read(run.out / "config.json"), out=folder, resume=True, lr=0.5))
        sample(Sample(folder, prompts="a red circle on a white ground", n=2, steps=2))
        export(Export(folder))
        assert sorted(file.name for file in tmp_path.iterdir()) == ["named_by_a_run.py", "python", "run"]
    found = evaluate_run(Evaluate(folder, reward="following-soft", samples=2, steps=()))
    assert found.samples == 2


def test_a_constant_in_the_reward_changes_nothing(tmp_path):
    """In float32. Around 21 rewards are multiples of 2^-19, and those of an epoch spread by .1, so the critic's targets
    differ by 1e-5 of their spread. Adam divides each entry of a gradient by its size: the change of a step in the mean
    square is up to some 4e-5 of it, .6 % of its length, and path KL, quadratic in it, moves by 2 % at the most."""

    def trained(constant):
        def redness(images, prompts, metadata):
            return images[:, 0].mean((1, 2)) + constant

        s = short(
            ASSETS / "tiny-sd", tmp_path / f"{constant}", algorithm="actor-critic", epochs=3, samples=8, steps=4,
            guidance=1.0, lr=1e-5, critic_lr=1e-2, eval_samples=8, eval_steps=(), pictures_every=0,
            log_with="none", options=("nodes=16", "critic_updates=40", "actor_updates=2", "keep=2"),
        )  # fmt: skip
        return train(s, reward=redness)

    plain, raised = trained(0.0), trained(21.0)
    assert plain.evaluation.path_kl > 0.01
    for kl, other in [(m["kl"], n["kl"]) for m, n in zip(plain.history, raised.history, strict=True)]:
        assert other == pytest.approx(kl, rel=0.02)
    assert raised.evaluation.path_kl == pytest.approx(plain.evaluation.path_kl, rel=0.02)
    assert raised.evaluation.gain == pytest.approx(plain.evaluation.gain, rel=0.02, abs=2**-19)


@pytest.mark.parametrize("changes", [{}, {"lora": 2}], ids=str)
def test_the_untuned_side_of_the_evaluation_is_the_reference(model, tmp_path, monkeypatch, changes):
    """No second pipeline is loaded; what it would have found is the same."""
    if changes:
        pytest.importorskip("peft")
    loaded = []
    monkeypatch.setattr(
        models, "load", lambda *given, load=models.load, **options: loaded.append(given) or load(*given, **options)
    )
    found = train(short(model, tmp_path / "run", epochs=1, pictures_every=0, **changes))
    assert len(loaded) == 1
    again = evaluate_run(Evaluate(tmp_path / "run", out=tmp_path))
    assert (again.reward_before, again.gain) == pytest.approx(
        (found.evaluation.reward_before, found.evaluation.gain), abs=1e-5
    )


def test_training_frees_its_optimisers_before_the_evaluation(model, tmp_path, monkeypatch):
    """And gradients: they are three times the weights."""
    made, seen = [], []

    def adam(*given, **options):
        optimizer = torch.optim.AdamW(*given, **options)
        made.append(weakref.ref(optimizer))
        return optimizer

    def look(s, pipeline, *given, judged=finetune.judged):
        gc.collect()
        seen.append(([ref() for ref in made], [p for p in pipeline.unet.parameters() if p.grad is not None]))
        return judged(s, pipeline, *given)

    monkeypatch.setattr(tuning, "optimizer_of", lambda s: adam)
    monkeypatch.setattr(finetune, "judged", look)
    train(short(model, tmp_path / "run", epochs=1, pictures_every=0))
    assert seen == [([None, None], [])]


def test_a_run_may_leave_the_evaluation_out(model, tmp_path, capsys):
    """Its pipeline is kept, with a card; `evaluate --run` finds later what would have been found."""
    found = train(short(model, tmp_path / "run", epochs=1, pictures_every=0, eval=False))
    assert found.evaluation is None and str(tmp_path / "run" / "pipeline") in capsys.readouterr().out
    left = sorted(file.name for file in (tmp_path / "run").iterdir() if not file.name.startswith(("sd15", ".")))
    assert left == ["checkpoints", "config.json", "metrics.jsonl", "pipeline"]
    assert "base_model" in (tmp_path / "run" / "pipeline" / "README.md").read_text()
    assert evaluate_run(Evaluate(tmp_path / "run")).path_kl > 0


def test_a_trial_is_small_and_of_everything(model, tmp_path):
    """In a folder of its own, which it overwrites."""
    s = short(model, tmp_path / "run", quick=True, in_a_row=3, epochs=7, samples=999, eval_samples=999)
    for _ in range(2):
        found = train(s)
        assert found.out == tmp_path / "run-quick" and (found.out / "report.html").is_file()
        assert [m["trajectories"] for m in found.history] == [9, 18] and found.evaluation.samples == 4
    assert not (tmp_path / "run").exists()
    assert Settings.read(found.out / "config.json").resolved().out == found.out


# settings


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"algorithm": "magic"}, "algorithm must be one of actor-critic"),
        ({"solver": "magic"}, "solver must be one of 2m|solver must be one of heun"),
        ({"precision": "fp8"}, "precision must be"),
        pytest.param(
            {"precision": "fp16"},
            "precision fp16 is not supported on the CPU, .*: pass bf16 or no",
            marks=pytest.mark.skipif(not is_cpu(), reason="fp16 is supported here"),
        ),
        ({"guidance": 0.5}, "guidance must be >= 1"),
        ({"steps": 1}, "steps must be >= 2"),
        ({"steps": 1001}, "steps must be at most the model's 1000"),
        ({"beta": 0.0}, "beta must be > 0"),
        ({"kl": -1.0}, "kl must be > 0"),
        ({"eval_samples": 1}, "eval_samples"),
        ({"options": ("magic=1",)}, "options: ActorCritic has critic_updates"),
        ({"options": ("nodes=many",)}, "options: nodes must be a number, as in nodes=128, got 'many'"),
        ({"prompts": "not_there.txt"}, "there is no file not_there.txt"),
        ({"reward": "magic"}, "must be one of jpeg-compressibility"),
        ({"model": "./not/there"}, "model: there is no folder ./not/there"),
        ({"solver": "diffusers/lcm"}, "is of no use here"),
        ({"solver": "diffusers/magic"}, "sampler must be one of"),
        ({"solver": "diffusers/ddim", "kl": 1.0}, "no KL along its paths|noise"),
        ({"algorithm": "ddpo", "solver": "heun", "options": ()}, "no transition density, which DDPO needs"),
        ({"algorithm": "td-form", "solver": "heun", "options": ()}, "no transition density, which TDForm needs"),
        ({"steps": 900, "grid": "timesteps"}, "end above timestep 0"),
        ({"reward": "not_there:f"}, "not_there:f cannot be imported: No module named"),
        ({"other_reward": "math:not_there"}, "cannot be imported: module 'math' has no attribute"),
        ({"reward": "math.sqrt"}, r"did you mean math:sqrt\?"),
        ({"reward": "jpeg-compressibility=large"}, "has no model to be named"),
        (
            {"reward": "not_there:f", "reward_python": sys.executable},
            r"not_there:f cannot be had in reward_python(.|\n)*No module named 'not_there'",
        ),
        (
            {"reward": "math:sqrt", "algorithm": "adjoint-matching", "options": (), "reward_python": sys.executable},
            "has no gradient",
        ),
        ({"algorithm": "ddop"}, "did you mean 'ddpo'"),
        ({"prompts": "animls"}, "did you mean 'animals'"),
        ({"eval_samplers": ("unpic",)}, "did you mean 'unipc'"),
        ({"resume": True, "overwrite": True}, "take one"),
        ({"lora": 4, "offload_reference": True}, "its adapters off"),
        ({"gamma": 0.1}, "gamma must be > 0 for q-learning"),
        ({"eta": 0.0, "kl": 1.0}, "without noise there is no path KL"),
        ({"epochs": "ten"}, "epochs must be an integer, got 'ten'"),
        ({"lr": float("nan")}, "lr must be a number"),
        ({"lr": 0.0}, r"lr must be > 0, got 0\.0"),
        ({"out": "/dev/null/run"}, "no folder that can be written to"),
        ({"reward_python": "/not/there"}, "no program that can be run"),
        ({"reward": "following", "algorithm": "adjoint-matching", "options": ()}, "has no gradient"),
        ({"eight_bit": True}, "bitsandbytes"),
    ],
    ids=str,
)
def test_what_cannot_be_is_said_before_weights_are_loaded(model, tmp_path, monkeypatch, changes, message):
    """By a run, and by a dry one."""
    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", None)
    for work in (train, finetune.dry_run):
        with pytest.raises(ValueError, match=message):
            work(short(model, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_settings_come_from_a_file_and_the_command_line_has_the_last_word(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("model: here\nlr: 1e-5\nsteps: 7\neval_steps: [3, 4]\noptions: [nodes=8]\n")
    s = settings_of(Settings, ["--config", str(tmp_path / "mine.yaml"), "--steps", "9"])
    assert (s.model, s.lr, s.steps, s.eval_steps, s.options) == ("here", 1e-5, 9, (3, 4), ("nodes=8",))
    (tmp_path / "mine.json").write_text(json.dumps({"guidance": 3.0}))
    assert settings_of(Settings, ["--config", str(tmp_path / "mine.json")]).guidance == 3.0
    (tmp_path / "wrong.yaml").write_text("stepz: 7")
    for file, message in (("wrong.yaml", "stepz"), ("not_there", "there is no file")):
        with pytest.raises(ValueError, match=message):
            settings_of(Settings, ["--config", str(tmp_path / file)])
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "--guidance" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_embedded_model_is_trained():
    assert settings_of(Settings, []) == Settings.read(EMBEDDED)
    assert settings_of(Settings, ["--model", "mine"]) == Settings(model="mine")


def test_a_dry_run_says_what_it_would_need(model, tmp_path, capsys):
    main(["--model", str(model), "--out", str(tmp_path / "run"), "--dry-run", "--steps", "7", "--samples", "3"])
    said = capsys.readouterr().out
    assert "steps: 7" in said and "network calls per epoch: " in said and "hours at " in said
    assert not (tmp_path / "run").exists()
    assert "# warning" not in said
    main(["--model", str(model), "--out", str(tmp_path / "run"), "--dry-run", "--eval-samples", "16"])
    said = capsys.readouterr().out
    assert "# warning: eval_samples = 16 leaves out 35 of 51 prompts, from 'an elephant' to 'a zebra'\n" in said
    assert yaml.safe_load(said)["eval_samples"] == 16
    weights = UNet2DConditionModel.from_pretrained(model, subfolder="unet").num_parameters()
    assert f"weights {4 * weights / 2**20:.0f} MiB" in said and "activations" in said


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda folder: write(folder / "model_index.json", _class_name="FluxPipeline"), "is a FluxPipeline"),
        (lambda folder: write(folder / "unet" / "config.json", in_channels=9), "takes 9 channels .* inpainting"),
        (lambda folder: next((folder / "unet").glob("*.safetensors")).unlink(), "has no weights in .safetensors"),
        (lambda folder: write(folder / "scheduler" / "scheduler_config.json", prediction_type="sample"), "predicts"),
        (shutil.rmtree, "model: there is no folder"),
    ],
)
def test_a_dry_run_refuses_the_model_that_a_run_refuses(model, tmp_path, damage, message):
    damage(folder := Path(shutil.copytree(model, tmp_path / "model")))
    for work in (
        lambda: main(["--model", str(folder), "--out", str(tmp_path / "run"), "--dry-run"]),
        lambda: train(short(folder, tmp_path / "run")),
    ):
        with pytest.raises(ValueError, match=message):
            work()
    assert not (tmp_path / "run").exists()


def write(file, **changes):
    """Other values in a JSON file."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_images_need_not_be_square(model, tmp_path):
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    write(folder / "unet" / "config.json", sample_size=[8, 12])
    found = train(short(folder, tmp_path / "run", reward="jpeg-compressibility", epochs=1))
    assert found.evaluation.path_kl > 0
    sample(Sample(tmp_path / "run", n=2, steps=2))
    with Image.open(tmp_path / "run" / "samples" / "0000.png") as drawn:
        assert drawn.size == (48, 32)


def test_a_budget_wraps_the_algorithm(model, tmp_path):
    found = algorithm_of(short(model, tmp_path, kl=3.0), True)
    assert isinstance(found, KLBudget) and found.nats == 3.0 and found.algorithm.nodes == 8


def test_a_black_box_has_a_kl_budget_unless_beta_is_given(monkeypatch):
    """On the embedded model; beta would not be used beside a budget that nobody set."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    reward = ["--reward", "jpeg-compressibility"]
    assert settings_of(Settings, reward).kl == 1.5 and settings_of(Settings, []).kl is None
    assert settings_of(Settings, [*reward, "--beta", "0.05"]).kl is None
    assert settings_of(Settings, [*reward, "--beta", "0.05", "--kl", "3"]).kl == 3.0


@pytest.mark.parametrize(
    "changes", [{}, {"lora": 2}, pytest.param({"offload_reference": True}, marks=pytest.mark.long)], ids=str
)
def test_saved_weights_have_the_requested_kl(changes, model, tmp_path):
    """The evaluation measures it on the same samples."""
    options = {"eval_kl_samples": 8, "eval_samples": 8, "eval_headline": 5, "eval_steps": (), "warmup": 0,
               "prompts": "shapes-doubtful"}  # fmt: skip
    free = train(short(model, tmp_path / "free", **options, **changes)).evaluation.path_kl
    found = train(short(model, tmp_path / "run", kl=free / 2, **options, **changes))
    assert found.evaluation.path_kl == pytest.approx(free / 2, rel=0.05)


def test_stretch_moves_weights_along_the_line(model):
    pipeline = models.load(str(model))
    policy = tuning.Score.of(pipeline)
    reference = policy.frozen()
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    learned = [p.clone() for p in policy.parameters()]
    policy.stretch(reference, 0.5)
    for p, p_ref, was in zip(policy.parameters(), reference.parameters(), learned, strict=True):
        torch.testing.assert_close(p, (p_ref + was) / 2)


def test_decided_is_independent_of_batch_size_and_grows_along_the_path(model, tmp_path):
    """The reward is better known from the last state than from noise."""
    found = []
    for batch in (3, 64):
        s = short(model, tmp_path / str(batch), reward="jpeg-compressibility", eval_samples=8, batch=batch, steps=6)
        rows = json.loads((finetune.measure_decided(s) / "decided.json").read_text())["rows"]
        assert [row["step"] for row in rows] == list(range(6)) and (s.out / "decided.png").is_file()
        found.append(torch.tensor([[row["log_snr"], row["share"], row["se"]] for row in rows]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-3)
    assert (found[0][:, 0].diff() > 0).all() and found[0][-1, 1] > found[0][0, 1] and found[0][-1, 1] > 0.9


# the embedded model


def test_the_embedded_model_follows_its_prompts_and_doubts_some():
    """Nine sure ones in ten; of 54 pictures of doubtful ones as many as its recipe says, within four standard errors
    of a share."""
    pipeline = models.load(str(ASSETS / "tiny-sd"))
    recipe = json.loads((ASSETS / "tiny-sd" / "recipe.json").read_text())["follows_its_prompts"]
    right = {}
    for name in ("shapes", "shapes-doubtful"):
        drawn = draw(pipeline, read(name), range(54), "dpmsolver++", 12, 3.0, 54)
        right[name] = sum(judge(i, parse(p.text)).right for i, p in zip(drawn.images, drawn.prompts, strict=True)) / 54
    expected = recipe["doubtful"]["3.0"]["right"]
    assert right["shapes"] > 0.9
    assert abs(right["shapes-doubtful"] - expected) < 4 * (expected * (1 - expected) / 54) ** 0.5


def test_the_embedded_model_is_half_as_a_file_and_float32_in_diffusers(tmp_path):
    """The one that is shipped, and one that the recipe saves."""
    make_tiny_sd.save(untrained(), tmp_path)
    for folder in (ASSETS / "tiny-sd", tmp_path):
        pipeline = StableDiffusionPipeline.from_pretrained(folder)
        pipeline.set_progress_bar_config(disable=True)
        assert pipeline("a red circle on a white ground", num_inference_steps=2).images[0].size == (32, 32)
        files = [*folder.glob("*/*.safetensors")]
        assert len(files) == 3 and {v.dtype for file in files for v in load_file(file).values()} == {torch.float16}


@pytest.mark.long
def test_the_recipe_runs(tmp_path):
    make_tiny_sd.main(Recipe(out=tmp_path, pictures=64, vae_steps=2, unet_steps=2, judged=1))
    report = json.loads((tmp_path / "recipe.json").read_text())
    assert report["follows_its_prompts"]["sure"]["1.0"]["right"] < 0.5 and report["megabytes"] < 8
    assert models.load(str(tmp_path)).unet.num_parameters() == report["parameters"]["unet"]


if __name__ == "__main__":
    worker(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
