"""torchsde and our solvers on the same path: to rounding in the clock, to the order elsewhere."""

import dataclasses
from itertools import pairwise

import numpy as np
import pytest
import torch
import torchsde

from ctrl import (
    EulerMaruyama,
    Exponential,
    Heun,
    IsotropicNormal,
    Noise,
    ScoreAsAction,
    VPLinear,
    fit_order,
    grids,
    rollout,
)  # fmt: skip
from ctrl.bridge import ClockedBrownian, RecordedBrownian, TorchSDE, sdeint
from toy import catalogue

NAMES = ["lq-1d", "lq-4d", "gaussian-1d", "mixture-2d"]


def same_path(name, steps, solver=EulerMaruyama(), samples=6):
    """Our rollout, and torchsde's Euler in the clock on the increments that it recorded."""
    entry = catalogue.get(name)
    times = grids.uniform(entry.problem, steps)
    ours = rollout(entry.problem, entry.optimal_policy, times, Noise(4), torch.arange(samples), solver=solver)
    return entry, times, ours


@pytest.mark.parametrize("name", NAMES)
def test_euler_agrees_to_rounding_in_the_clock(name):
    """S dW = L dW~(clock): the same increments, the same formula, the same numbers."""
    entry, times, ours = same_path(name, 32)
    path = RecordedBrownian.of(entry.problem, ours)
    theirs = sdeint(entry.problem, entry.optimal_policy, times, ours.x[0], in_clock=True, brownian=path,
                    method="euler", dt=float(times.diff().max()))  # fmt: skip
    torch.testing.assert_close(theirs.x, ours.x, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("solver", [EulerMaruyama(), Heun(), Exponential()], ids=str)
def test_brownian_interval_drives_both(solver):
    """One BrownianInterval in the clock int g²; torchsde on 2,048 steps is the truth, ours converge to it at strong
    order 1."""
    problem = dataclasses.replace(catalogue.get("gaussian-1d").problem, s_min=0.05)
    fine = grids.uniform(problem, 1024)
    clock, n = problem.clock(fine), 200
    interval = torchsde.BrownianInterval(t0=0.0, t1=float(clock[-1]), size=(n, 1), dtype=torch.float64, entropy=5)
    start = problem.initial(Noise(0), torch.arange(n))
    theirs = sdeint(problem, problem.reference, fine[[0, -1]], start, in_clock=True, brownian=interval, method="euler",
                    dt=float(problem.horizon / 1024)).x[-1]  # fmt: skip

    class Interval(Noise):
        def path(self, ids, shape, times, clock):
            tau = clock(times)
            for a, b in pairwise(tau):
                yield interval(a, b) / (b - a).sqrt()

    steps, errors = [32, 64, 128], []
    for k in steps:
        x = rollout(
            problem, problem.reference, fine[:: 1024 // k], Interval(0), torch.arange(n), solver=solver, start=start
        ).x[-1]
        errors.append(float((x - theirs).square().mean().sqrt()))
    assert fit_order(steps, errors) == pytest.approx(1, abs=0.2)


def in_t(name, steps):
    """Mean distance between ours and torchsde's Euler in t, which takes S(t_k) sqrt(dt) xi: the same xi."""
    entry, times, ours = same_path(name, steps, samples=300)
    path = RecordedBrownian(times, ours.xi.flatten(2) * times.diff().sqrt()[:, None, None])
    theirs = sdeint(entry.problem, entry.optimal_policy, times, ours.x[0], brownian=path, method="euler",
                    dt=float(times.diff().max()))  # fmt: skip
    return float((theirs.x[-1] - ours.x[-1]).square().sum(1).mean().sqrt())


def test_without_the_clock_it_agrees_to_the_order():
    """Noise that depends on t: S(t_k) sqrt(dt) against the exact integral, a relative O(dt) a step. Next order: 1.5."""
    steps = [64, 128, 256]
    assert fit_order(steps, [in_t("gaussian-1d", k) for k in steps]) == pytest.approx(1, abs=0.2)


def test_constant_noise_needs_no_clock():
    """S constant: both to rounding, with a full matrix S (general noise)."""
    assert in_t("lq-4d", 32) < 1e-10


def test_adaptive_steps_come_back_as_a_trajectory():
    """An adaptive torchsde method at tight tolerance solves the probability-flow ODE as a fine Heun does; at times
    between its steps torchsde interpolates, which at its step of ~1e-2 leaves h² |y''|/8 ~ 1e-3."""
    problem = dataclasses.replace(catalogue.get("mixture-2d").problem, eta=0.0)
    times, ids = grids.uniform(problem, 4), torch.arange(5)
    start = problem.initial(Noise(0), ids)
    theirs = sdeint(
        problem, problem.reference, times, start, ids=ids, method="srk", adaptive=True, rtol=1e-7, atol=1e-8, dt=1e-2
    )
    ours = rollout(problem, problem.reference, grids.uniform(problem, 4000), Noise(0), ids, solver=Heun(), start=start)
    assert theirs.x.shape == (5, 5, 2)
    torch.testing.assert_close(theirs.x[-1], ours.x[-1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(theirs.x[2], ours.x[2000], rtol=1e-3, atol=1e-3)


def test_states_of_any_shape_are_flattened_for_torchsde():
    entry = catalogue.get("lq-4d")
    sde = TorchSDE(entry.problem, entry.optimal_policy)
    y = torch.zeros(3, 4)
    assert sde.f(torch.tensor(0.0), y).shape == (3, 4)
    assert sde.g(torch.tensor(0.0), y).shape == (3, 4, 4)
    assert TorchSDE(catalogue.get("mixture-2d").problem, None).g(torch.tensor(0.0), y[:, :2]).shape == (3, 2)


def test_errors_name_the_remedy():
    entry, times, ours = same_path("gaussian-1d", 8)
    path = RecordedBrownian.of(entry.problem, ours)
    with pytest.raises(ValueError, match="nodes only"):
        sdeint(
            entry.problem, entry.optimal_policy, times, ours.x[0], in_clock=True, brownian=path, method="euler", dt=0.01
        )
    with pytest.raises(ValueError, match="xi"):
        RecordedBrownian.of(entry.problem, dataclasses.replace(ours, xi=None))
    with pytest.raises(ValueError, match="in_clock=False"):
        ClockedBrownian(entry.problem, path)(torch.tensor(0.0), torch.tensor(0.1), return_U=True)


def test_the_condition_and_the_ids_reach_torchsde_and_come_back():
    """One path, classes in the condition: our Euler's numbers, with ids, cond and trapezoid weights recorded."""
    entry = catalogue.get("mixture-2d-conditional")
    problem, ids = entry.problem, torch.arange(3, 9)
    times, cond = grids.uniform(problem, 8), entry.condition(ids)
    ours = rollout(problem, entry.optimal_policy, times, Noise(4), ids, cond=cond)
    path = RecordedBrownian.of(problem, ours)
    theirs = sdeint(problem, entry.optimal_policy, times, ours.x[0], ids=ids, cond=cond, in_clock=True, brownian=path,
                    method="euler", dt=float(times.diff().max()))  # fmt: skip
    torch.testing.assert_close(theirs.x, ours.x, rtol=1e-10, atol=1e-10)
    assert theirs.ids is ids and theirs.cond is cond
    assert torch.equal(theirs.w, grids.trapezoid(problem, times))


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_images_are_flattened_for_torchsde_and_come_back(eta):
    """Shape (3, 2, 2) from a late start, on the Brownian motion that sdeint makes: the flat problem's numbers."""

    def run(shape):
        problem = ScoreAsAction(
            VPLinear(), lambda t, x, c: -x, lambda x, c: x.flatten(1).sum(1), IsotropicNormal(shape), shape, eta=eta
        )
        np.random.seed(1)  # noqa: NPY002  # torchsde draws its entropy there
        times, start = grids.uniform(problem, 5)[1:], torch.linspace(-1, 1, 24).reshape(2, *shape)
        return sdeint(problem, problem.reference, times, start, in_clock=True, method="euler", dt=0.1)

    flat, image = run((12,)), run((3, 2, 2))
    assert image.x.shape == (5, 2, 3, 2, 2)
    torch.testing.assert_close(image.x.flatten(2), flat.x)
    assert image.ids.tolist() == [0, 1]


def test_times_and_states_are_checked():
    """As in our own rollouts; and a method that wants Levy areas, of either kind, is refused in the clock."""
    problem = catalogue.get("mixture-2d").problem
    start, path = torch.zeros(2, 2), ClockedBrownian(problem, RecordedBrownian(torch.zeros(1), torch.zeros(1, 2, 2)))
    with pytest.raises(ValueError, match="times must be a 1-D tensor"):
        sdeint(problem, problem.reference, torch.tensor([0.5, 0.5]), start)
    with pytest.raises(ValueError, match="not finite"):
        sdeint(problem, lambda t, x, c: x + torch.nan, grids.uniform(problem, 2), start, method="euler", dt=0.5)
    with pytest.raises(ValueError, match="in_clock=False"):
        path(torch.tensor(0.0), torch.tensor(0.1), return_A=True)
