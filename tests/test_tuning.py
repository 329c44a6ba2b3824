"""scale/tuning.py and `scale.settings.Tuning`: what every command that fine-tunes has, shown on one of its own."""

import html.parser
import json
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DDPMPipeline, DDPMScheduler
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import save_file

from ctrl import DDIM, Estimate, Heun, grids
from ctrl.algorithms import NextValue, PPOPenalty, TDForm
from ctrl.training import files
from ctrl.training.guards import Guards
from scale import report, tuning
from scale.evaluate import calls_of_nats
from scale.samplers import BlackBox
from scale.settings import EMBEDDED, FREE, LIMITS, Settings, Tuning


@dataclass(frozen=True, kw_only=True)
class Mine(Tuning):
    """Another command's settings."""

    limits: ClassVar[dict[str, str]] = {**LIMITS, "classes": ">= 1"}
    free: ClassVar[frozenset[str]] = FREE | {"said"}
    embedded: ClassVar[Path] = Path("not_there.yaml")
    events: ClassVar[str] = "mine"

    model: str = "mine"
    reward: str = "jpeg-compressibility"
    out: Path = Path("runs/mine")
    epochs: int = 3
    classes: int = 10
    """Of pictures."""
    said: str = ""
    rate: float | None = None

    def conflicts(self):
        return super().conflicts() | {"classes must be 10 for ddpo": self.algorithm == "ddpo" and self.classes != 10}


@pytest.fixture
def pipeline():
    return DDPMPipeline(torch.nn.Identity(), DDPMScheduler(num_train_timesteps=100))


# settings


def test_a_field_of_ones_own_is_read_and_written(tmp_path):
    (tmp_path / "mine.yaml").write_text("classes: 7\nrate: 1e-5\neval_steps: [3, 4]\nprecision: no\n")
    s = Mine.read(tmp_path / "mine.yaml")
    assert s == Mine(classes=7, rate=1e-5, eval_steps=(3, 4), precision="no") and s.epochs == 3
    (tmp_path / "again.json").write_text(json.dumps(s.plain()))
    assert Mine.read(tmp_path / "again.json") == s
    assert Mine(model="embedded").model == "not_there" and Settings(model="embedded").model == str(
        EMBEDDED.with_suffix("")
    )


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"classes": 0}, "classes must be >= 1"),
        ({"classes": "ten"}, "classes must be an integer, got 'ten'"),
        ({"epochs": 0}, "epochs must be >= 1"),
        ({"reward_lr": -1.0}, "reward_lr must be >= 0"),
        ({"classes": 9, "algorithm": "ddpo", "solver": "ddim"}, "classes must be 10 for ddpo"),
        ({"resume": True, "overwrite": True}, "take one"),
        ({"algorithm": "json:loads"}, r"algorithm: json:loads cannot be made: loads\(\) missing"),
        ({"algorithm": "json:JSONDecoder"}, r"must be a ctrl.algorithms.Algorithm, got JSONDecoder"),
        ({"algorithm": "no_such_module:Mine"}, "cannot be made: No module named 'no_such_module'"),
    ],
    ids=str,
)
def test_a_field_of_ones_own_is_checked_beside_the_others(changes, message):
    with pytest.raises(ValueError, match=message):
        Mine(**changes)


@pytest.mark.parametrize(
    "options, learns",
    [
        ({"algorithm": "adjoint-matching"}, False),
        ({"algorithm": "forward-matching"}, False),
        ({"algorithm": "forward-matching", "options": ("critic_updates=8",)}, True),
        ({"algorithm": "td-form"}, True),
        ({"algorithm": "ctrl.algorithms:PPOClip"}, True),
    ],
    ids=str,
)
def test_an_algorithm_says_whether_it_learns_values(options, learns, tmp_path):
    """By its name and options, or as module:Class; what it says decides whether a critic can be pretrained."""
    assert tuning.check(Mine(out=tmp_path, **options)).learns_value == learns
    if learns:
        tuning.check(Mine(out=tmp_path, pretrain=1, **options))
    else:
        with pytest.raises(ValueError, match="which has no critic"):
            tuning.check(Mine(out=tmp_path, pretrain=1, **options))


def test_a_file_of_another_command_is_refused(tmp_path):
    (tmp_path / "sd.yaml").write_text("guidance: 3.0\n")
    with pytest.raises(ValueError, match=r"must be one of .*, got 'guidance'"):
        Mine.read(tmp_path / "sd.yaml")


def test_a_run_goes_on_with_the_same_but_for_what_is_free(tmp_path):
    """A config.json from before a setting was thought of serves too."""
    old = Mine(out=tmp_path, classes=7).plain()
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in old.items() if k != "reward_lr"}))
    Mine(out=tmp_path, classes=7, said="now", batch=2, eval_samples=2, resume=True).check_resumed()
    for changes in ({"classes": 8}, {"classes": 7, "reward_lr": 0.1}):
        with pytest.raises(ValueError, match=r"is .*, and was .* in .*: resume with the same"):
            Mine(out=tmp_path, resume=True, **changes).check_resumed()
    assert tuning.settings_of_run(Mine, tmp_path) == Mine(out=tmp_path, classes=7)
    with pytest.raises(ValueError, match=r"has no config\.json"):
        tuning.settings_of_run(Mine, tmp_path / "nowhere")


def test_the_command_line_has_the_last_word(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(Mine, "embedded", tmp_path / "small.yaml")
    (tmp_path / "small.yaml").write_text("model: embedded\nclasses: 7\noptions: [nodes=8]\n")
    apart = {"algorithm": {"options": ()}}

    def read(*arguments):
        return tuning.settings_of(Mine, list(arguments), apart, "what it does")

    assert read() == Mine(model=str(tmp_path / "small"), classes=7, options=("nodes=8",))
    assert read("--model", "other", "--classes=5") == Mine(model="other", classes=5)
    assert read("--algorithm", "ppo").options == () and read("--epochs", "4").options == ("nodes=8",)
    (tmp_path / "mine.yaml").write_text("classes: 6\nsaid: a\n")
    assert read("--config", str(tmp_path / "mine.yaml"), "--said=b=c") == Mine(classes=6, said="b=c")
    with pytest.raises(ValueError, match="config must name a file"):
        read("--config")
    with pytest.raises(SystemExit):
        read("--help")
    said = capsys.readouterr().out
    assert "what it does" in said and "Of pictures." in said and "Learning rate of the critic." in said


def test_an_evaluation_has_the_runs_settings_but_for_what_is_asked(tmp_path):
    s = Mine(eval_samples=8, eval_steps=(3,), classes=7)
    asked = tuning.Evaluate(tmp_path, samples=4, samplers=("euler",))
    assert asked.over(s, classes=None, said="b") == Mine(
        eval_samples=4, eval_samplers=("euler",), eval_steps=(3,), classes=7, said="b"
    )
    assert tuning.Evaluate(tmp_path, reward="x", steps=(), grid_samples=2).over(s) == Mine(
        reward="x", eval_samples=8, eval_steps=(), eval_grid_samples=2, classes=7
    )
    with pytest.raises(ValueError, match="grid_samples must be >= 2"):
        tuning.Evaluate(tmp_path, grid_samples=1)


@pytest.mark.parametrize(
    "environment, cuda, given, precision",
    [
        ({}, None, "auto", "no"),
        ({}, "old", "auto", "no"),  # such as V100 and T4, which emulate it
        ({}, "new", "auto", "bf16"),
        ({}, "new", "no", "no"),
        (
            {"ACCELERATE_MIXED_PRECISION": "no"},
            "new",
            "auto",
            "bf16",
        ),  # what accelerate launch sets if nothing is asked
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "new", "auto", "fp16"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, None, "auto", "bf16"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "new", "fp16", "fp16"),
        ({"ACCELERATE_USE_CPU": "true"}, "new", "auto", "no"),
    ],
)
def test_precision_is_half_on_cuda_unless_another_is_asked_for(environment, cuda, given, precision, monkeypatch):
    for name in ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda is not None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: cuda == "new")
    assert Mine(precision=given).resolved().precision == precision


def test_the_learning_rate_is_that_of_the_kind_of_training():
    assert (Settings().resolved().lr, Settings(lora=8).resolved().lr, Mine().resolved().lr) == (1e-5, 1e-4, 1e-5)
    assert Settings(lora=8, lr=3e-6).resolved().lr == 3e-6
    assert Settings.read(EMBEDDED).resolved().lr == 1.5e-4


@pytest.mark.parametrize(
    "reward, other, expected",
    [
        ("pickscore", "auto", "clip-score"),
        ("0.5 * imagereward + jpeg-compressibility", "auto", "clip-score"),
        ("mine:pickscore", "auto", None),
        ("clip-score", "auto", None),
        ("following", "auto", None),
        ("mine:f", "clip-score", "clip-score"),
        ("pickscore", None, None),
    ],
)
def test_a_second_reward_from_the_hub_comes_with_a_first_or_is_asked_for(reward, other, expected):
    assert Settings(reward=reward, other_reward=other).resolved().other_reward == expected
    assert Settings(reward=reward).other_reward == "auto"


# the parts


@pytest.mark.parametrize("name, kind", [("td-form", TDForm), ("next-value", NextValue), ("ppo", PPOPenalty)])
def test_options_reach_a_part(name, kind):
    made = tuning.algorithm_of(Mine(algorithm=name, options=("nodes=8", "evaluation.critic_updates=2")), True)
    assert isinstance(made, kind) and (made.nodes, made.evaluation.critic_updates) == (8, 2)
    assert made.evaluation.actor_updates == kind().evaluation.actor_updates
    with pytest.raises(ValueError, match="options: ActorCritic has critic_updates"):
        tuning.algorithm_of(Mine(algorithm=name, options=("evaluation.magic=2",)), True)


def test_a_box_has_its_own_times_and_its_own_noise(pipeline):
    s = Mine(solver="diffusers/ddim", reward_lr=0.3, steps=10).resolved()
    box = tuning.solver_of(s, pipeline)
    made = tuning.fit_settings(s, box, tuning.grid_of(s, pipeline))
    assert isinstance(box, BlackBox) and (made.grid, made.jitter, made.reward_lr) == (box.grid, 0.0, 0.3)
    noisy = tuning.solver_of(Mine(solver="diffusers/sde-dpmsolver++"), pipeline)
    assert (tuning.eta_of(s, box), tuning.eta_of(s, noisy), tuning.eta_of(Mine(eta=0.5), DDIM())) == (0.0, 1.0, 0.5)
    own = tuning.fit_settings(Mine(jitter=0.2).resolved(), Heun(), grids.natural)
    assert isinstance(own.solver, Heun) and own.jitter == 0.2 and own.epochs == 3


def test_a_model_has_only_so_many_timesteps(pipeline):
    tuning.check_timesteps(pipeline, steps=(100,), eval_steps=())
    with pytest.raises(ValueError, match="eval_steps must be at most the model's 100 timesteps, got 101"):
        tuning.check_timesteps(pipeline, steps=(100,), eval_steps=(3, 101))


def test_the_reward_that_is_trained_on_comes_first():
    found = tuning.rewards_of(Mine(reward_retries=2), other="jpeg-incompressibility")
    assert list(found) == ["reward", "other"] and found["reward"].retries == 2
    assert [reward.__name__ for reward in found.values()] == ["jpeg-compressibility", "jpeg-incompressibility"]

    def mine(images, prompts, metadata):
        return images.mean((1, 2, 3))

    (only,) = tuning.rewards_of(Mine(), mine).values()
    assert only.__name__ == "mine" and not tuning.differentiable(Mine(), only)
    with pytest.raises(ValueError, match="has no gradient, which adjoint-matching needs"):
        tuning.differentiable(Mine(algorithm="adjoint-matching"), only)
    mine.differentiable = True
    assert tuning.differentiable(Mine(algorithm="adjoint-matching"), only)


def test_what_is_warned_of():
    assert tuning.guards_of(Mine()) == Guards(diversity=0.5)
    assert tuning.guards_of(Mine(max_kl=2.0, stop_on_collapse=True)) == Guards(kl=2.0, diversity=0.5, stop=True)


# a run


@pytest.mark.parametrize(
    ("changes", "wait"),
    [
        ({}, timedelta(minutes=30)),
        ({"reward_retries": 2}, timedelta(minutes=30)),
        # 5 calls for 17 samples, 4 at a time, each of them tried three times
        ({"reward_retries": 2, "reward_timeout": 60.0}, timedelta(minutes=30 + 5 * 3)),
        ({"reward_timeout": 60.0, "eval_samples": 24}, timedelta(minutes=30 + 6)),
    ],
)
def test_a_lost_process_is_noticed_in_half_an_hour_and_what_a_reward_may_take(tmp_path, changes, wait):
    s = Mine(**{"out": tmp_path, "samples": 17, "batch": 4, "eval_samples": 2, **changes}).resolved()
    accelerator = tuning.accelerator_of(s)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert accelerator.init_handler.timeout == wait


def test_a_folder_with_a_run_is_not_written_over(tmp_path):
    (tmp_path / "critic" / "checkpoints" / "epoch-000001").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds a run already"):
        tuning.check(Mine(out=tmp_path))
    assert tuning.check(Mine(out=tmp_path, resume=True, kl=1.0)) == tuning.algorithm_of(Mine(), True)
    tuning.check(Mine(out=tmp_path, overwrite=True))


def test_what_an_earlier_run_left_goes_and_the_settings_are_kept(tmp_path, capsys):
    for name in ("checkpoints", "mine", "report.html", "lora", "notes"):
        (tmp_path / name).mkdir()
    s = Mine(out=tmp_path, overwrite=True, log_with="none", algorithm="td-form").resolved()
    task = tuning.Task(problem=None, policy=torch.nn.Linear(3, 2), learner=None, algorithm=None, critic=None,
                       conditions=None, fit=None)  # fmt: skip
    task.policy.bias.requires_grad_(False)
    accelerator = tuning.accelerator_of(s)
    tuning.begin(s, task, accelerator)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "notes"]
    assert Mine.read(tmp_path / "config.json") == s
    said = capsys.readouterr().out
    assert (
        "model: mine\n1 process on cpu\n" in said
        and "0.00 M of 0.00 M weights, by td-form on jpeg-compressibility" in said
    )


def test_the_best_checkpoint_is_chosen_and_its_average_read(tmp_path):
    for epoch in (1, 2, 3):
        folder = tmp_path / "checkpoints" / f"epoch-{epoch:06d}"
        folder.mkdir(parents=True)
        save_file(
            {"mean.network.w": torch.full((1,), float(epoch)), "mean.other": torch.zeros(1)},
            folder / "policy.safetensors",
        )
        (folder / files.PROGRESS).write_text("{}")
        (folder / files.MANIFEST).write_text(json.dumps(files.manifest(folder)))
    lines = [json.dumps({"reward": reward, "kl": kl}) for reward, kl in ((1.0, 0.0), (2.0, 5.0), (0.5, 0.0))]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert tuning.chosen(tuning.Export(tmp_path), 0.1).name == "epoch-000002"
    assert tuning.chosen(tuning.Export(tmp_path), 1.0).name == "epoch-000001"
    assert tuning.network_weights(tuning.chosen(tuning.Export(tmp_path, epoch=3), 0.1)) == {"w": torch.tensor([3.0])}
    save_file({"network.w": torch.tensor([9.0])}, tmp_path / "checkpoints" / "epoch-000003" / "ema.safetensors")
    assert tuning.network_weights(tmp_path / "checkpoints" / "epoch-000003") == {"w": torch.tensor([9.0])}
    (tmp_path / "checkpoints" / "epoch-000003" / "policy.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match="is not whole"):
        tuning.chosen(tuning.Export(tmp_path, epoch=3), 0.1)


def test_a_checkpoint_of_a_part_is_enough_if_it_is_what_is_trained(tmp_path):
    unet = torch.nn.Sequential(torch.nn.Linear(2, 2).requires_grad_(False), torch.nn.Linear(2, 1))
    file, ours = (
        tmp_path / "policy.safetensors",
        {f"network.{name}": v + 1 for name, v in unet[1:].state_dict().items()},
    )
    save_file(ours, file)
    tuning.restore(unet, tmp_path)
    assert all(torch.equal(v, ours[f"network.{name}"]) for name, v in unet[1:].state_dict().items())
    for wrong in ({"network.1.weight": torch.zeros(1, 2)}, {**ours, "network.2.weight": torch.zeros(1)}):
        save_file(wrong, file)
        with pytest.raises(ValueError, match=r"is of another model: (1\.bias|2\.weight) is not in both"):
            tuning.restore(unet, tmp_path)


def test_an_error_of_a_users_is_a_line(monkeypatch):
    def wrong(arguments):
        raise ValueError(f"{arguments} will not do")

    monkeypatch.setattr("sys.argv", ["mine.py", "that"])
    monkeypatch.delenv("DEBUG", raising=False)
    with pytest.raises(SystemExit, match=r"\['that'\] will not do"):
        tuning.run_command(wrong)
    monkeypatch.setenv("DEBUG", "1")
    with pytest.raises(ValueError, match="will not do"):
        tuning.run_command(wrong)


# the report


def test_a_report_of_what_there_is(tmp_path):
    """No prompts, no grid of samplers; what is empty is left out, and text is text."""
    sections = {
        "Pictures": report.pictures({"before": torch.rand(3, 3, 8, 8)}) + report.paragraph("a < b"),
        "Training": report.curves([]), "Samplers": report.samplers([]), "Settings": report.listed(Mine().plain()),
    }  # fmt: skip
    report.html(tmp_path / "report.html", "mine <yours>", "gain 1\nkl 2", sections)
    seen = []

    class Reader(html.parser.HTMLParser):
        def handle_starttag(self, tag, attributes):
            seen.append(tag)

        def handle_data(self, data):
            seen.append(data)

    Reader().feed((tmp_path / "report.html").read_text())
    assert [seen[i + 1] for i, tag in enumerate(seen) if tag in ("h1", "h2")] == [
        "mine <yours>",
        "Pictures",
        "Settings",
    ]
    assert "a < b" in seen and "gain 1" in seen and seen.count("img") == 1


def test_help_names_the_file_and_every_option(capsys):
    """Each with its default, by a name that `--options` takes."""
    with pytest.raises(SystemExit):
        tuning.settings_of(Settings, ["--help"], {}, "What it does.")
    said = " ".join(capsys.readouterr().out.split())
    assert "--config FILE" in said and "What it does." in said
    assert "evaluation.critic_updates=16" in said
    for name, option in (("actor-critic", "keep=4"), ("ddpo", "clip=0.9"), ("adjoint-matching", "lean=True")):
        assert option in said
        tuning.algorithm_of(Mine(algorithm=name, options=(option.replace("True", "true"),), solver="ddim"), True)


class Line:
    """In place of a policy: how far along the line its weights are."""

    way = 1.0

    def stretch(self, reference, ratio):
        self.way *= ratio


@example(power=2.0, learned=4.0)
@given(power=st.floats(0.5, 2.5), learned=st.floats(0.1, 20))
def test_match_kl_reaches_the_requested_kl(power, learned):
    """Along a line on which the KL goes as a power of the way, from 1 nat; what was not learned is not made up."""
    line, asked = Line(), []

    def nats(problem, policy, conditions, samples, steps, batch):
        asked.append((samples, steps))
        return Estimate(torch.tensor(learned * policy.way**power), torch.tensor(0.0), samples)

    task = SimpleNamespace(problem=SimpleNamespace(reference=None), policy=line, conditions=None)
    s = Mine(kl=1.0, eval_kl_samples=7)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "nats", nats)
        tuning.match_kl(s, task, SimpleNamespace(print=str), 5)
        tuning.match_kl(Mine(), task, SimpleNamespace(print=str), 5)  # no budget: nothing to do
    assert set(asked) == {(7, 5)} and len(asked) <= tuning.MAX_MEASUREMENTS
    if learned * tuning.MAX_STRETCH**power < 1:
        assert line.way == pytest.approx(tuning.MAX_STRETCH)
    else:
        assert learned * line.way**power == pytest.approx(1, rel=tuning.KL_TOLERANCE)
    if power == 2:
        assert len(asked) == 2 and tuning.calls_of_match_kl(s, 5) == 2 * calls_of_nats(7, 5)
