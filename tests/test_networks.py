"""Small networks: the reference before training, and features that exist over the whole horizon."""

import dataclasses
import math

import pytest
import torch

from ctrl import Noise, grids, rollout
from tests.strategies import states
from toy import catalogue
from toy.networks import Perceptron, Policy, Value

every = pytest.mark.parametrize("name", catalogue.NAMES)


def inputs(name, n=6):
    """t over the whole horizon, ends included; x, cond and a_ref there."""
    entry = catalogue.get(name)
    _, x = states(entry.problem, n=n)
    t, cond = torch.linspace(0, entry.problem.horizon, n), entry.condition(torch.arange(n))
    return entry.problem, t, x, cond, entry.problem.reference(t, x, cond)


def wake(module):
    """Any weights in the last layer, which starts at zero."""
    for w in module.network.layers[-1].parameters():
        torch.nn.init.normal_(w)
    return module


@every
def test_a_policy_starts_as_the_reference(name):
    """a = a_ref(t, x, cond) before training, exactly, and in the actions' own dimension; not so once it has moved."""
    problem, t, x, cond, a_ref = inputs(name)
    policy = Policy(problem)
    assert torch.equal(policy(t, x, cond), a_ref)
    moved = wake(policy)(t, x, cond) - a_ref
    assert moved.shape == a_ref.shape and bool((moved != 0).all())


@every
def test_a_policy_can_be_rolled_out(name):
    """The reference's trajectories at first."""
    entry, ids = catalogue.get(name), torch.arange(4)
    times, cond = grids.natural(entry.problem, 3), entry.condition(torch.arange(4))
    paths = [
        rollout(entry.problem, policy, times, Noise(0), ids, cond=cond)
        for policy in (Policy(entry.problem), entry.problem.reference)
    ]
    assert torch.equal(paths[0].x, paths[1].x)


def test_a_policy_of_a_class_starts_from_its_guess():
    """Two classes at one state differ by the reference and by what the network makes of x0hat under it."""
    problem, t, x, cond, a_ref = inputs("mixture-2d-conditional")
    policy = wake(Policy(problem))
    guess = problem.endpoint(t, x, a_ref)
    assert torch.equal(policy(t, x, cond), a_ref + policy.network(t, x, guess))
    assert not torch.equal(guess, problem.endpoint(t, x, problem.reference(t, x, (cond + 1) % 3)))


@every
def test_a_value_starts_at_zero(name):
    """One number a sample, zero before training; then a function of t, x and, in a diffusion, x0hat."""
    problem, t, x, cond, a_ref = inputs(name)
    value, guess = Value(problem), problem.endpoint(t, x, a_ref)
    assert torch.equal(value(t, x, guess, cond), torch.zeros(6))
    F = wake(value)(t, x, guess, cond)
    assert F.shape == (6,)
    assert bool((value(t / 2, x, guess) != F)[1:].all()) and bool((value(t, x + 1, guess) != F).all())
    assert bool((value(t, x, guess + 1) != F).all()) != name.startswith("lq")  # where there is no guess but x


@every
@pytest.mark.parametrize("hidden", [8, 64])
def test_features_are_finite_at_both_ends(name, hidden):
    """The input of the first layer, on the whole horizon and a rounding beyond, is finite and of order one; so are the
    output and its gradient."""
    problem, t, x, _, a_ref = inputs(name, n=9)
    seen = []
    network = wake(Policy(problem, hidden)).network
    network.layers[0].register_forward_pre_hook(lambda layer, args: seen.append(args[0].detach()))
    guess = problem.endpoint(t, x, a_ref)
    for shift in (0.0, 1e-9):
        x = x.requires_grad_()
        out = network(t + shift, x, guess)
        (slope,) = torch.autograd.grad(out.sum(), x)
        assert out.shape == a_ref.shape
        assert bool(torch.isfinite(out).all()) and bool(torch.isfinite(slope).all())
    features = torch.cat(seen)
    d, diffusion = math.prod(problem.shape), not name.startswith("lq")
    assert features.shape[1] == d * (1 + diffusion) + 3 + diffusion
    assert bool(torch.isfinite(features).all())
    assert float(features[:, d * (1 + diffusion) :].abs().max()) < 3


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("time", [torch.float32, torch.float64])
def test_precision(name, dtype, time):
    """Modules of either precision answer in that of the states, whatever the times have."""
    problem, t, x, cond, a_ref = inputs(name)
    policy, value = (wake(m(problem)).to(dtype) for m in (Policy, Value))
    t, x = t.to(time), x.to(dtype)
    a = policy(t, x, cond)
    assert a.dtype == dtype and bool(torch.isfinite(a).all())
    assert value(t, x, problem.endpoint(t, x, a_ref.to(dtype)), cond).dtype == dtype


def test_a_module_made_in_float32_stays_there():
    """The default dtype is that of the machine in production."""
    torch.set_default_dtype(torch.float32)
    problem, t, x, _, _ = inputs("mixture-2d")
    policy = Policy(problem)
    assert {w.dtype for w in policy.parameters()} == {torch.float32}
    x = x.float()
    assert torch.equal(policy(t, x), problem.reference(t, x))


def test_perceptron_by_hand():
    """W_3 silu(W_2 silu(W_1 f + b_1) + b_2) + b_3 of f = (x, t/T, sin, cos), angles pi t/T."""
    problem = catalogue.get("lq-4d").problem
    network = wake(type("Holder", (), {"network": Perceptron(problem, 3, hidden=5)})).network
    t, x = states(problem)
    u = t / problem.horizon
    h = torch.cat([x, torch.stack([u, (math.pi * u).sin(), (math.pi * u).cos()], 1)], 1)
    linear = [layer for layer in network.layers if isinstance(layer, torch.nn.Linear)]
    for layer in linear[:-1]:
        h = h @ layer.weight.mT + layer.bias
        h = h * torch.sigmoid(h)
    torch.testing.assert_close(network(t, x, x), h @ linear[-1].weight.mT + linear[-1].bias)


@every
def test_networks_are_trained_whole(name):
    """Every parameter of a policy and of a value has a gradient once the last layer is awake."""
    problem, t, x, cond, a_ref = inputs(name)
    for module, out in (
        (policy := wake(Policy(problem)), lambda: policy(t, x, cond)),
        (value := wake(Value(problem)), lambda: value(t, x, problem.endpoint(t, x, a_ref), cond)),
    ):
        out().square().sum().backward()
        assert all(w.grad is not None and float(w.grad.abs().max()) > 0 for w in module.parameters())


def test_a_network_of_classes_tells_them_apart():
    """One-hot inputs: at the same state and guess each class has its own output; every weight of theirs learns."""
    problem, t, x, cond, a_ref = inputs("mixture-2d-conditional")
    classes = catalogue.get("mixture-2d-conditional").classes
    for module, call in (
        (policy := wake(Policy(problem, classes=classes)), lambda c: policy.network(t, x, a_ref, c)),
        (value := wake(Value(problem, classes=classes)), lambda c: value(t, x, a_ref, c)[:, None]),
    ):
        out = torch.stack([call((cond + k) % classes) for k in range(classes)])
        assert bool((out.diff(dim=0) != 0).all())
        out.square().sum().backward()
        assert float(module.network.layers[0].weight.grad[:, -4 - classes :].abs().min()) > 0
    assert classes == 3 and catalogue.get("mixture-2d").classes == 0


def test_the_reference_is_not_copied():
    """A policy's parameters are its network's."""
    problem = dataclasses.replace(catalogue.get("mixture-2d").problem, reference=lambda t, x, c: -x)
    policy = Policy(problem)
    assert {id(w) for w in policy.parameters()} == {id(w) for w in policy.network.parameters()}
