"""ctrl/fields.py, and every dataclass of settings: what is wrong is a ValueError that names it, whatever it is."""

import dataclasses
import inspect
import math
from pathlib import Path
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ctrl.algorithms
from benchmarks import (
    algorithms,
    critics,
    discretization_error,
    faults,
    frontier,
    pictures,
    report,
    sd_tiny,
    throughput,
)
from benchmarks import cifar10 as forms
from ctrl import NotFinite, fit
from ctrl.fields import check_fields, one_of, within
from ctrl.training.interrupts import RunFailed
from scale import cifar10, finetune, rewards, settings, tuning
from scale.prompts import Prompt
from scale.recipes.pretrain import Pretrain

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=2) | st.tuples(inner) | st.dictionaries(st.text(max_size=2), inner, max_size=2)
    ),
    max_leaves=3,
)
ALGORITHMS = [
    kind for kind in vars(ctrl.algorithms).values()
    if inspect.isclass(kind) and issubclass(kind, ctrl.algorithms.Algorithm) and not inspect.isabstract(kind)
]  # fmt: skip
BENCHMARKS = [
    algorithms.AlgorithmOptions, discretization_error.BiasOptions, faults.FaultOptions, report.Options,
    sd_tiny.SDTinyOptions, forms.CIFAROptions, critics.CriticOptions, frontier.FrontierOptions,
    pictures.PictureOptions, report.TrainingOptions, throughput.ThroughputOptions,
]  # fmt: skip
SETTINGS = [
    fit.Settings, settings.Settings, finetune.Evaluate, finetune.Sample, tuning.Export, cifar10.Settings,
    cifar10.Evaluate, cifar10.Sample, Pretrain, *ALGORITHMS, *BENCHMARKS,
]  # fmt: skip
NEEDED = {
    "Evaluate": {"run": Path("run")}, "Sample": {"run": Path("run")},
    "Export": {"run": Path("run")}, "CIFAROptions": {"data": Path("data")},
    "InverseRL": {"algorithm": ctrl.algorithms.ActorCritic(), "data": torch.zeros_like},
    "KLBudget": {"algorithm": ctrl.algorithms.ActorCritic(), "nats": 1.0},
}  # fmt: skip


def outcome(f, *errors):
    """What f returns, or the error of a user's that it raises."""
    try:
        return f()
    except (ValueError, *errors) as wrong:
        return wrong


@dataclasses.dataclass
class Plain:
    count: int = 1
    size: float = 1.0
    maybe: float | None = None
    word: Literal["a", "b"] = "a"
    many: tuple[int, ...] = (1,)
    where: Path = Path()
    other: object = None


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"count": 1.0}, "count must be an integer, got 1.0"),
        ({"count": True}, "count must be an integer, got True"),
        ({"count": 0}, "count must be >= 1, got 0"),
        ({"size": "1"}, "size must be a number, got '1'"),
        ({"size": math.nan}, "size must be a number, got nan"),
        ({"size": math.inf}, r"size must be in \(0, 2\], got inf"),
        ({"maybe": "x"}, "maybe must be a number or nothing, got 'x'"),
        ({"maybe": math.inf}, "maybe must be > 0, got inf"),
        ({"word": "c"}, "word must be one of a, b, got 'c'"),
        ({"many": (1, "2")}, "many must be a list, each an integer"),
        ({"many": 1}, "many must be a list, got 1"),
        ({"where": "here"}, "where must be a path, got 'here'"),
    ],
    ids=str,
)
def test_a_wrong_field_is_named(changes, message):
    limits = {"count": ">= 1", "size": "in (0, 2]", "maybe": "> 0"}
    check_fields(Plain(), limits)
    check_fields(Plain(2, 2, 1e-9, "b", (), Path("x"), object()), limits)
    with pytest.raises(ValueError, match=message):
        check_fields(Plain(**changes), limits)


@given(st.floats(), st.floats(0, 10), st.floats(0, 10))
def test_limits(v, a, b):
    low, high = sorted((a, b))
    assert within(v, f">= {low!r}") == (low <= v < math.inf)
    assert within(v, f"> {low!r}") == (low < v < math.inf)
    assert within(v, f"in [{low!r}, {high!r})") == (low <= v < high)
    assert within(v, f"in ({low!r}, {high!r}]") == (low < v <= high)


def test_what_is_near_is_named():
    one_of("it", "left", ["left", "right"])
    with pytest.raises(ValueError, match=r"it must be one of left, right, got 'rihgt'; did you mean 'right'\?"):
        one_of("it", "rihgt", ["left", "right"])
    with pytest.raises(ValueError, match=r"got 'x'$"):
        one_of("it", "x", ["left", "right"])


@pytest.mark.parametrize("kind", SETTINGS, ids=lambda kind: f"{kind.__module__}.{kind.__name__}")
@given(data=st.data())
def test_any_settings_are_taken_or_refused(kind, data):
    """By ValueError, and no other way; what is not of a plain type is the type checker's."""
    names = [f.name for f in dataclasses.fields(kind) if not callable(f.default) and "Callable" not in str(f.type)]
    changes = data.draw(st.dictionaries(st.sampled_from(names), ANYTHING, max_size=3))
    made = outcome(lambda: kind(**{**NEEDED.get(kind.__name__, {}), **changes}))
    if isinstance(made, ValueError):
        assert str(made)
    else:
        for name, value in changes.items():
            kept = getattr(made, name)
            assert kept == value or str(kept) == value


@given(st.dictionaries(st.sampled_from([f.name for f in dataclasses.fields(settings.Settings)]), ANYTHING, max_size=3))
def test_any_file_of_settings_is_taken_or_refused(tmp_path_factory, given_settings):
    file = tmp_path_factory.mktemp("settings") / "x.yaml"
    file.write_text("\n".join(f"{k}: {v!r}" for k, v in given_settings.items()) or "{}", errors="replace")
    assert isinstance(outcome(lambda: settings.Settings.read(file)), ValueError | settings.Settings)


@given(st.text(max_size=20), st.sampled_from(["actor-critic", "ppo", "ddpo"]))
def test_any_option_is_taken_or_refused(text, algorithm):
    for option in (text, f"nodes={text}", f"{text}=1"):
        s = settings.Settings(algorithm=algorithm, solver="2m", options=(option,))
        assert isinstance(outcome(lambda s=s: tuning.algorithm_of(s, True)), ValueError | ctrl.algorithms.Algorithm)


RETURNS = ANYTHING | st.sampled_from([
    torch.zeros(2), torch.zeros(3, 1), torch.zeros(3), torch.zeros(3, dtype=torch.int64),
    torch.tensor([0.0, 1.0, math.nan]), torch.zeros(3, requires_grad=True), torch.zeros(3, dtype=torch.complex64),
])  # fmt: skip
RAISES = st.sampled_from(
    [KeyError("k"), MemoryError(), AttributeError("a"), StopIteration(), OSError(5), AssertionError()]
)


@given(RETURNS, RAISES | st.none())
def test_any_reward_is_taken_or_refused(answer, error):
    def mine(images, prompts, metadata):
        if error is not None:
            raise error
        return answer

    found = outcome(
        lambda: rewards.ask(rewards.Patient(mine), torch.zeros(3, 3, 4, 4), [Prompt("a fox")] * 3), RunFailed
    )
    if isinstance(found, Exception):
        assert "mine" in str(found)
        lost = error is None and torch.is_tensor(answer) and answer.shape == (3,) and bool(answer.isnan().any())
        assert isinstance(found, NotFinite) == lost
    else:
        assert found.shape == (3,) and bool(found.isfinite().all()) and not found.requires_grad
