"""ctrl/training/guards.py: the policy that acts is the one that is trained; numbers are numbers; collapse is seen."""

import dataclasses
import math
import re
import warnings

import pytest
import torch
from safetensors.torch import load_file
from test_fit import Once, fresh_engine, models, squares, train  # noqa: F401
from torch import nn

from ctrl import EulerMaruyama, Noise, VPLinear, rollout
from ctrl.grids import natural, node_weights
from ctrl.rollout import NotFinite
from ctrl.training import guards
from ctrl.training.guards import Guards
from toy import catalogue


class Two(nn.Module):
    """A policy that is shifted by a constant where gradients are wanted: in updates, not in rollouts."""

    def __init__(self, shift):
        super().__init__()
        self.inner, self.shift = models()[0], shift

    def forward(self, t, x, cond=None):
        return self.inner(t, x, cond) + (self.shift if torch.is_grad_enabled() else 0.0)


def test_another_policy_in_updates_is_refused_with_its_distance():
    """A shift of all d actions by c is 1/2 c² d int g² dt nats apart, by the rollout's own quadrature."""
    problem, shift = catalogue.get("mixture-2d").problem, 0.3
    with pytest.raises(ValueError, match="not the one that acted") as refused:
        train(built=(Two(shift), models()[1]), solver=EulerMaruyama(), jitter=0.0)
    ids = torch.arange(2)
    path = rollout(problem, problem.reference, natural(problem, 6), Noise(0), ids, solver=EulerMaruyama())
    w = node_weights(path.w)[:-1]
    nats = 0.5 * shift**2 * 2 * float((w * problem.rate(path.t[:-1])).sum())
    found = float(re.search(r"acted: ([\d.e+-]+) nats", str(refused.value))[1])
    assert found == pytest.approx(nats, rel=5e-3)  # three digits are printed
    assert "0.001 are allowed" in str(refused.value)


def test_a_policy_that_is_near_enough_is_taken():
    for shift, mismatch in ((0.3, math.inf), (1e-9, 1e-3)):
        assert len(train(built=(Two(shift), models()[1]), epochs=1, mismatch=mismatch).history) == 1


@pytest.mark.parametrize("make", [lambda: nn.Dropout(0.5), lambda: nn.BatchNorm1d(2)], ids=["dropout", "batch norm"])
def test_what_differs_from_call_to_call_is_seen(make):
    network = make()

    class Noisy(Two):
        def forward(self, t, x, cond=None):
            return self.inner(t, x, cond) + 0.1 * network(x)

    with pytest.raises(ValueError, match="Look for dropout, batch statistics"):
        train(built=(Noisy(0.0), models()[1]))


def test_rounding_is_allowed_for():
    """½ D (8u)² times the range of log-SNR; of a problem without one, nothing."""
    problem = catalogue.get("gaussian-16d").problem
    span = -problem.noising.log_snr(torch.tensor([problem.s_min, problem.s_max])).diff()
    assert isinstance(problem.noising, VPLinear)
    assert guards.rounding(problem, "bf16") == pytest.approx(0.5 * 16 * (8 / 512) ** 2 * float(span))
    assert guards.rounding(problem, "bf16") == pytest.approx(16 * guards.rounding(problem, "fp16"))
    assert guards.rounding(problem, "no") < 1e-10
    assert guards.rounding(catalogue.get("lq-1d").problem, "bf16") == 0


# what is not a number


def poison(run, nodes):
    """The loss of the node at step 4 of sample 7 is not a number."""
    loss = squares(run, nodes)
    return torch.where((nodes.ids == 7) & (nodes.k == 4), torch.nan * loss, loss)


def test_a_loss_that_is_no_number_is_named_and_kept(tmp_path):
    everything = 24 * 7
    with pytest.raises(NotFinite, match=r"policy: the loss is nan at step 4 \(t = .*\) of sample id 7.*1 in a row"):
        train(algorithm=Once(poison, everything), patience=1, out=tmp_path)
    (file,) = (tmp_path / "not-finite").iterdir()
    kept = load_file(file)
    assert file.name == "epoch-000001-policy-1-0.safetensors"
    assert kept["ids"][kept["losses"].isnan()].tolist() == [7] and kept["x"].shape == (everything, 2)


def test_a_gradient_that_is_no_number_is_named():
    """The square root of zero has a value, and no gradient."""

    policy, critic = models()
    name = next(iter(dict(policy.named_parameters())))

    def root(run, nodes):
        p = dict(run.policy.named_parameters())[name]
        return squares(run, nodes) + (p - p.detach()).square().sum().sqrt()

    with pytest.raises(NotFinite, match=rf"policy: the gradient of {re.escape(name)} is not finite"):
        train(algorithm=Once(root), built=(policy, critic), patience=1)


def test_what_is_left_out_moves_nothing():
    policy, critic = models()
    with pytest.warns(UserWarning, match=r"epoch 1: policy: the loss is nan .*this update is left out"):
        train(algorithm=Once(lambda run, n: torch.nan * squares(run, n)), built=(policy, critic), epochs=1)
    for p, q in zip(policy.parameters(), models()[0].parameters(), strict=True):
        assert torch.equal(p, q)


def test_patience_is_for_times_in_a_row():
    """Two of three do not end a run, ever; three do."""

    def sick(run, nodes):
        return squares(run, nodes) * (torch.nan if run.noise.epoch % 3 else 1.0)

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        train(algorithm=Once(sick), epochs=9)
    assert [bool(re.search(r"\(2 in a row\)", str(w.message))) for w in said] == [False, True] * 3
    with pytest.warns(UserWarning, match="left out"), pytest.raises(NotFinite, match="3 in a row"):
        train(algorithm=Once(lambda run, n: torch.nan * squares(run, n)), epochs=9)


def test_an_epoch_without_numbers_is_left_out_and_the_rest_is_as_if_it_had_not_been_drawn(tmp_path):
    """Its samples are kept for inspection; nothing is learned; the metrics say no reward."""
    entry, calls = catalogue.get("mixture-2d"), 0

    def reward(x, cond):
        nonlocal calls
        calls += 1
        return entry.problem.reward(x, cond) / (0.0 if calls == 2 else 1.0)

    problem, seen = dataclasses.replace(entry.problem, reward=reward), []

    def look(run, metrics):
        seen.append(torch.cat([p.detach().flatten() for p in run.policy.parameters()]))

    with pytest.warns(UserWarning, match="epoch 2: reward is not finite for sample id 24.*this epoch is left out"):
        run = train(problem=problem, callbacks=[look], out=tmp_path)
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])
    assert ["reward" in metrics for metrics in run.history] == [True, False, True]
    assert [metrics["trajectories"] for metrics in run.history] == [24, 24, 48]
    assert load_file(next((tmp_path / "not-finite").iterdir()))["ids"][0] == 24


def test_rewards_that_stay_no_numbers_end_the_run(tmp_path):
    entry = catalogue.get("mixture-2d")
    problem = dataclasses.replace(entry.problem, reward=lambda x, cond: x.sum(1) / 0)
    with pytest.warns(UserWarning, match="left out"), pytest.raises(NotFinite, match="3 in a row"):
        train(problem=problem, epochs=9, out=tmp_path)


# collapse


@pytest.mark.parametrize(
    "now, faults",
    [
        ({"kl": 1.0}, []),
        ({"kl": 3.0}, ["the path KL is 3 nats, over 2"]),
        ({"reward_std": 0.0, "reward": 7.0}, ["all rewards are 7"]),
        ({"spread": 0.9}, ["samples spread by 0.9, 45% of what they did"]),
        ({"spread": 0.1, "kl": 9.0}, ["the path KL is 9", "5% of what they did"]),
    ],
    ids=str,
)
def test_collapse_by_hand(now, faults):
    first = {"reward": 0.0, "reward_std": 1.0, "spread": 2.0}
    found = Guards(kl=2.0).faults({**first, **now}, first)
    assert len(found) == len(faults) and all(a in b for a, b in zip(faults, found, strict=True))
    assert Guards(kl=2.0).faults({"epoch": 3}, first) == []


def test_a_collapse_is_warned_of_or_ends_the_run_with_the_best_kept(tmp_path):
    with pytest.warns(UserWarning, match="the path KL is .* nats, over 1e-06"):
        train(callbacks=[Guards(kl=1e-6)], epochs=3)
    with pytest.warns(UserWarning, match="the path KL"), pytest.raises(SystemExit) as end:
        train(callbacks=[Guards(kl=1e-6, stop=True)], epochs=9, out=tmp_path)
    assert end.value.code == 1
    assert [f.name for f in (tmp_path / "checkpoints").iterdir()] == ["epoch-000002"]  # the first KL is 0
