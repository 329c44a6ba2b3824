"""Critics: the structured critic of arXiv 2502.01819, and gradients by autograd against hand derivatives."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ctrl import (
    COSINE,
    LINEAR,
    VE,
    Critic,
    IsotropicNormal,
    RectifiedFlow,
    ScoreAsAction,
    StructuredCritic,
    VPLinear,
    VPTable,
)
from ctrl.value import NetworkCritic
from toy import catalogue
from toy.networks import Value

M, C = torch.tensor([0.5, -1.0, 0.2], dtype=torch.float64), 0.7
"""Data N(M, C 1) before any noise."""
K = 0.8
H = torch.tensor([1.0, -0.3, 0.4], dtype=torch.float64)
NOISINGS = {"vp": VPLinear(), "table": VPTable.scaled_linear(), "ve": VE(0.01, 3.0), "rectified": RectifiedFlow()}
every = pytest.mark.parametrize("noising", NOISINGS.values(), ids=NOISINGS.keys())


def reward(x, cond):
    """-½ K |x|² + <H, x>, plus cond."""
    return -K / 2 * x.square().sum(1) + x @ H.to(x) + (0 if cond is None else cond)


def network(t, x, x0hat, cond):
    """F = t <H, x> + |x|²/4 + 2, plus cond."""
    return t * (x @ H.to(x)) + x.square().sum(1) / 4 + 2 + (0 if cond is None else cond)


def problem(noising, reward=reward, s_min=0.01, s_max=0.95):
    def column(h, t):
        return h((s_max - t).clamp(min=s_min))[:, None]

    def score(t, x, cond):
        alpha, sigma = column(noising.alpha, t), column(noising.sigma, t)
        return -(x - alpha.to(x) * M.to(x)) / (alpha**2 * C + sigma**2).to(x)

    return ScoreAsAction(noising, score, reward, IsotropicNormal((3,)), (3,), s_min=s_min, s_max=s_max)


def states(n=5, seed=0):
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(a, b, rtol=1e-10, atol=1e-10):
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@pytest.mark.parametrize(
    "name, kind", [("network", StructuredCritic), ("reward", StructuredCritic), ("network", NetworkCritic)]
)
def test_one_number_a_sample(name, kind):
    """A column (B, 1) would broadcast to (B, B)."""
    p, x = problem(VPLinear()), states()
    column = {"network": lambda t, x, x0hat, c: x[:, :1]}
    if name == "reward":
        p = replace(p, reward=lambda x, c: x[:, :1])
    critic = kind(p, column.get(name, lambda t, x, x0hat, c: x[:, 0]))
    with pytest.raises(ValueError, match=name):
        critic.value(torch.zeros(len(x)), x)


@every
@pytest.mark.parametrize("skip", [COSINE, LINEAR])
@pytest.mark.parametrize("s_min", [0.0, 0.01])
def test_at_the_data_end_it_is_the_reward(noising, skip, s_min):
    """V(T, x) = r(x), the clean end included: there x0hat = x, c_skip = 1 and c_out = 0."""
    s_min = s_min or 1e-9 * isinstance(noising, RectifiedFlow)  # whose g² vanishes at 0
    p, x = problem(noising, s_min=s_min), states()
    critic, T = StructuredCritic(p, network, skip), torch.full((5,), p.horizon)
    close(critic.value(T, x), reward(x, None), 1e-12, 1e-12)
    close(critic.grad(T, x), -K * x + H, 1e-12, 1e-12)
    close(critic.value(T, x, 0.3), reward(x, 0.3), 1e-12, 1e-12)
    close(critic.value(T + 1e-6, x), reward(x, None), 1e-12, 1e-12)  # a time that rounding moved beyond T


@every
@pytest.mark.parametrize("skip", [COSINE, LINEAR])
def test_at_the_start_it_is_the_network(noising, skip):
    """c_skip = 0 and c_out = 1 at t = 0."""
    critic, x, t = StructuredCritic(problem(noising), network, skip), states(), torch.zeros(5)
    close(critic.value(t, x), network(t, x, x, None))
    close(critic.grad(t, x), x / 2)
    close(critic.value(t, x, 0.3), network(t, x, x, 0.3))


@every
@pytest.mark.parametrize("skip", ["cosine", "linear"])
def test_value_and_gradient_by_hand(noising, skip):
    """X_{s_min} given X_s for Gaussian data is affine, x0hat = m_0 + A (x - alpha M), A = (alpha/alpha_0) C_0/C_s, so

    V = c_skip r(x0hat) + c_out F,   grad V = c_skip A (H - K x0hat) + c_out (t H + x/2).
    """
    p, x = problem(noising), states()
    t = torch.tensor([0.01, 0.2, 0.5, 0.8, 0.93])
    s, s0 = 0.95 - t, torch.tensor(0.01)
    alpha, alpha0 = noising.alpha(s), noising.alpha(s0)
    C_s, C_0 = alpha**2 * C + noising.sigma(s) ** 2, alpha0**2 * C + noising.sigma(s0) ** 2
    A = (alpha / alpha0 * C_0 / C_s)[:, None]
    x0hat = alpha0 * M + A * (x - alpha[:, None] * M)
    u = 1 - t / 0.94
    c_skip, c_out = (torch.cos(math.pi * u / 2), torch.sin(math.pi * u / 2)) if skip == "cosine" else (1 - u, u)
    critic = StructuredCritic(p, network, COSINE if skip == "cosine" else LINEAR)
    close(critic.value(t, x), c_skip * reward(x0hat, None) + c_out * network(t, x, x, None), 1e-9, 1e-9)
    by_hand = c_skip[:, None] * A * (H - K * x0hat) + c_out[:, None] * (t[:, None] * H + x / 2)
    close(critic.grad(t, x), by_hand, 1e-9, 1e-9)


def test_the_condition_reaches_the_reference():
    """x0hat is that of the class: V with cond = V of the problem whose score has cond built in."""
    p, x, t, cond = problem(VPLinear()), states(), torch.full((5,), 0.4), torch.arange(5.0, dtype=torch.float64)
    of_class, fixed = (
        StructuredCritic(replace(p, reference=lambda t, x, c, b=b: p.reference(t, x, c) + b(c)[:, None]), network)
        for b in (lambda c: c, lambda c: cond)
    )
    close(of_class.value(t, x, cond), fixed.value(t, x, cond))


@pytest.mark.parametrize("kind", [StructuredCritic, NetworkCritic])
def test_a_known_action_of_the_reference_saves_the_call(kind):
    """V beside a_ref is V, and the reference is not asked again."""
    p, x, t, cond = problem(VPLinear()), states(), torch.full((5,), 0.4), torch.arange(5.0, dtype=torch.float64)
    p = replace(p, reference=lambda t, x, c, s_ref=p.reference: s_ref(t, x, c) + c[:, None])

    def seen(t, x, x0hat, c):
        return x0hat.square().sum(1) + c

    a_ref, V = p.reference(t, x, cond), kind(p, seen).value(t, x, cond)
    silent = kind(replace(p, reference=None), seen)
    assert torch.equal(silent.value_given_reference(t, x, a_ref, cond), V)
    assert not torch.isclose(silent.value_given_reference(t, x, a_ref + 1, cond), V).any()


def test_a_critic_that_never_asks_ignores_it():
    x, t = states(), torch.full((5,), 0.4)
    assert torch.equal(Quadratic().value_given_reference(t, x, None), Quadratic().value(t, x))


def test_default_pair_is_the_papers():
    """c_skip = cos(pi u/2), c_out = sin(pi u/2)."""
    assert StructuredCritic(problem(VPLinear()), network).skip is COSINE


class Quadratic(Critic):
    """V = t |x|²/2."""

    def value(self, t, x, cond=None):
        return t * x.flatten(1).square().sum(1) / 2


class Frozen(Critic):
    def value(self, t, x, cond=None):
        return x.detach().sum(1)


@given(st.integers(0, 2**31), st.sampled_from([(3,), (2, 2), (1, 2, 3)]))
def test_grad_is_row_by_row(seed, shape):
    """grad V = t x, and V of one row does not leak into another."""
    x = torch.randn(4, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    t = torch.tensor([0.0, 0.3, 1.0, 2.0])
    close(Quadratic().grad(t, x), t.reshape(-1, *[1] * len(shape)) * x)


@pytest.mark.parametrize("critic", [Quadratic(), StructuredCritic(problem(VPLinear()), network)])
def test_grad_leaves_no_trace(critic):
    """No graph, no requires_grad on inputs or result, nothing on a graph already there; no_grad does not stop it."""
    t, x = torch.full((5,), 0.4), states()
    truth = critic.grad(t, x)
    assert not truth.requires_grad and not x.requires_grad and not t.requires_grad
    with torch.no_grad():
        assert torch.equal(critic.grad(t, x), truth)
        assert not torch.is_grad_enabled()
    leaf = x.clone().requires_grad_()
    assert torch.equal(critic.grad(t, leaf * 1), truth)
    assert leaf.grad is None


def test_grad_of_a_network_leaves_its_parameters_alone():
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 1)
    critic = StructuredCritic(problem(VPLinear()), lambda t, x, x0hat, cond: net(x)[:, 0])
    critic.grad(torch.zeros(5), states())
    assert all(w.grad is None for w in net.parameters())
    close(critic.grad(torch.zeros(5), states()), net.weight.detach().expand(5, 3))


BLACK_BOXES = {
    "detached": lambda x, cond: reward(x.detach(), cond),
    "elsewhere": lambda x, cond: torch.tensor([-K / 2 * sum(v * v for v in row) for row in x.tolist()]),
}


@pytest.mark.parametrize("black_box", BLACK_BOXES.values(), ids=BLACK_BOXES.keys())
@pytest.mark.parametrize("t", [0.0, 0.4, 0.94])
def test_a_reward_without_gradient_makes_grad_raise(black_box, t):
    """Whatever the network, a gradient without c_skip grad r(x0hat) is not that of V; the value is fine."""
    p = problem(VPLinear(), black_box)
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 1)
    for F in (
        network,
        lambda t, x, x0hat, cond: torch.zeros(len(x)),
        lambda t, x, x0hat, cond: net(x)[:, 0],
        lambda t, x, x0hat, cond: net(x.detach())[:, 0],
    ):
        critic, at = StructuredCritic(p, F), torch.full((5,), t)
        assert critic.value(at, states()).shape == (5,)
        with pytest.raises(ValueError, match="not differentiable"):
            critic.grad(at, states())


def test_a_black_box_reward_does_not_stop_the_critics_own_fit():
    """The gradient of V in the network's parameters needs no gradient of the reward, nor one in x."""
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 1)
    p = problem(VPLinear(), BLACK_BOXES["elsewhere"])
    learned = replace(p, reference=lambda t, x, cond: p.reference(t, x, cond) + net(x))
    critic = StructuredCritic(learned, lambda t, x, x0hat, cond: net(x)[:, 0])
    critic.value(torch.zeros(5), states()).sum().backward()
    close(net.weight.grad, states().sum(0, keepdim=True))
    with torch.no_grad():
        assert critic.value(torch.zeros(5), states().requires_grad_()).shape == (5,)


def test_a_value_without_gradient_makes_grad_raise():
    """Also where parameters alone carry a graph."""
    with pytest.raises(ValueError, match="Frozen is not differentiable in x"):
        Frozen().grad(torch.zeros(5), states())
    weight = torch.ones((), requires_grad=True)

    class Weighted(Critic):
        def value(self, t, x, cond=None):
            return weight * x.detach().sum(1)

    with pytest.raises(ValueError, match="Weighted is not differentiable in x"):
        Weighted().grad(torch.zeros(5), states())


@every
def test_float32_states(noising):
    """float64 times and float32 states give a float32 value and gradient, close to float64's."""
    critic, x, t = StructuredCritic(problem(noising), network), states(), torch.full((5,), 0.5)
    with_float32 = critic.value(t, x.float()), critic.grad(t, x.float())
    assert with_float32[1].dtype == torch.float32
    plain = StructuredCritic(problem(noising), lambda t, x, x0hat, c: x.sum(1))
    assert plain.value(t, x.float()).dtype == torch.float32
    close(with_float32[0].double(), critic.value(t, x), 1e-5, 1e-5)
    close(with_float32[1].double(), critic.grad(t, x), 1e-5, 1e-5)


def looking_ahead(t, x, x0hat, cond):
    """F = t |x0hat|²/2 + <H, x>, plus cond."""
    return t * x0hat.square().sum(1) / 2 + x @ H.to(x) + (0 if cond is None else cond)


@every
def test_a_network_may_look_at_where_the_state_ends(noising):
    """x0hat = m_0 + A (x - alpha M) as above, so grad F = t A x0hat + H: NetworkCritic is F, and in a structured
    critic's gradient it has the weight c_out."""
    p, x, t = problem(noising), states(), torch.tensor([0.01, 0.2, 0.5, 0.8, 0.93])
    s, s0 = 0.95 - t, torch.tensor(0.01)
    alpha, alpha0 = noising.alpha(s), noising.alpha(s0)
    A = alpha / alpha0 * (alpha0**2 * C + noising.sigma(s0) ** 2) / (alpha**2 * C + noising.sigma(s) ** 2)
    x0hat = alpha0 * M + A[:, None] * (x - alpha[:, None] * M)
    plain, structured = NetworkCritic(p, looking_ahead), StructuredCritic(p, looking_ahead)
    F, slope = t * x0hat.square().sum(1) / 2 + x @ H, (t * A)[:, None] * x0hat + H
    close(plain.value(t, x), F, 1e-9, 1e-9)
    close(plain.value(t, x, 0.3), F + 0.3, 1e-9, 1e-9)
    close(plain.grad(t, x), slope, 1e-9, 1e-9)
    u = math.pi / 2 * (1 - t / 0.94)
    by_hand = u.cos()[:, None] * A[:, None] * (H - K * x0hat) + u.sin()[:, None] * slope
    close(structured.grad(t, x), by_hand, 1e-9, 1e-9)
    close(structured.grad(t, x, 0.3), by_hand, 1e-9, 1e-9)


def test_where_nothing_ends_the_network_sees_the_state_twice():
    """On a matrix problem x0hat = x."""
    p, x, t = catalogue.get("lq-4d").problem, torch.ones(3, 4), torch.full((3,), 0.5)
    assert torch.equal(NetworkCritic(p, lambda t, x, x0hat, c: (x * x0hat).sum(1)).value(t, x), torch.full((3,), 4.0))
    assert torch.equal(StructuredCritic(p, lambda t, x, x0hat, c: 0 * t).grad(torch.full((3,), 2.0), x), p.h - x @ p.G)


def test_network_critic_s_gradient_by_finite_differences():
    """grad F of a network that looks at t, x and x0hat: central differences, error h²/6 max |d³F| + eps |F|/h."""
    p, x, t = problem(VPLinear()), states(), torch.tensor([0.01, 0.2, 0.5, 0.8, 0.93])
    critic, h = NetworkCritic(p, trained(p)), 1e-5
    for j, e in enumerate(torch.eye(3)):
        difference = (critic.value(t, x + h * e) - critic.value(t, x - h * e)) / (2 * h)
        close(critic.grad(t, x)[:, j], difference, 1e-8, 1e-8)
    assert float(critic.grad(t, x).abs().max()) > 0.01


def trained(p):
    """A network whose last layer is not zero."""
    net = Value(p, hidden=8)
    torch.nn.init.normal_(net.network.layers[-1].weight)
    return net


@pytest.mark.parametrize("discount", [0.0, 0.7])
@pytest.mark.parametrize("kind", ["network", "structured", "stand-in"])
def test_a_level_is_added_to_the_value_and_to_nothing_else(kind, discount):
    """V = m_t + F or m_t + c_skip (r(x0hat) - m) + c_out F, m_t = e^{-rho (T - t)} m: with a reward raised by m, or a
    stand-in as it is, V rises by m_t everywhere, the data end included, and grad V stays."""
    p, x, t, m = replace(problem(VPLinear()), discount=discount), states(), torch.linspace(0, 0.94, 5), 3.0
    raised, stand_in = replace(p, reward=lambda x, cond: reward(x, cond) + m), StandIn()

    def critic(of):
        if kind == "network":
            return NetworkCritic(of, network)
        return StructuredCritic(of, network, reward=stand_in if kind == "stand-in" else None)

    plain, level = critic(p), critic(raised)
    level.set_level(torch.tensor(m))
    close(level.value(t, x) - plain.value(t, x), m * torch.exp(-discount * (0.94 - t)))
    close(level.value(t, x, 0.3) - plain.value(t, x, 0.3), m * torch.exp(-discount * (0.94 - t)))
    close(level.grad(t, x), plain.grad(t, x))
    if kind == "structured":
        close(level.value(t, x)[-1:], raised.reward(x, None)[-1:])
    level.set_level(torch.tensor(8.0))  # it is set once
    assert float(level.level) == m


def test_an_exact_critic_has_no_level_to_set():
    critic, x, t = Quadratic(), states(), torch.full((5,), 0.4)
    before = critic.value(t, x)
    critic.set_level(torch.tensor(3.0))
    assert torch.equal(critic.value(t, x), before)


class StandIn(torch.nn.Module):
    """<w, x> + b, plus cond."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)

    def forward(self, x, cond):
        return self.layer(x)[:, 0] + (0 if cond is None else cond)


@pytest.mark.parametrize("black_box", BLACK_BOXES.values(), ids=BLACK_BOXES.keys())
def test_a_stand_in_gives_a_black_box_a_gradient(black_box):
    """V(T, x) = stand-in(x), and grad V = c_skip A w + c_out grad F; without it the error names the remedy."""
    p, x, t = problem(VPLinear(), black_box), states(), torch.tensor([0.0, 0.2, 0.5, 0.8, 0.94])
    with pytest.raises(ValueError, match=r"stand-in, reward=module"):
        StructuredCritic(p, network).grad(t, x)
    stand_in = StandIn()
    critic, T = StructuredCritic(p, network, reward=stand_in), torch.full((5,), p.horizon)
    close(critic.value(T, x), stand_in(x, None), 1e-12, 1e-12)
    close(critic.value(T, x, 0.3), stand_in(x, 0.3), 1e-12, 1e-12)
    close(critic.grad(T, x), stand_in.layer.weight.detach().expand(5, 3), 1e-12, 1e-12)
    smooth = StructuredCritic(replace(p, reward=stand_in), network)
    close(critic.grad(t, x), smooth.grad(t, x), 1e-12, 1e-12)
    close(critic.value(t, x), smooth.value(t, x), 1e-12, 1e-12)


def test_a_stand_in_is_trained_where_it_stands_in():
    """dV/db = c_skip(u) at time to go u, dF counts the rest; no gradient stays behind from asking grad V."""
    p, stand_in, net = problem(VPLinear(), BLACK_BOXES["elsewhere"]), StandIn(), trained(problem(VPLinear()))
    critic, x, t = StructuredCritic(p, net, reward=stand_in), states(), torch.full((5,), 0.4)
    critic.grad(t, x)
    assert all(w.grad is None for w in critic.parameters())
    critic.value(t, x).sum().backward()
    u = math.pi / 2 * (1 - t / p.horizon)
    close(stand_in.layer.bias.grad, u.cos().sum()[None], 1e-12, 1e-12)
    close(net.network.layers[-1].bias.grad, u.sin().sum()[None], 1e-12, 1e-12)


def test_what_a_critic_trains():
    """Its network and its stand-in: not the problem's reward, which is what it is to learn, even if that is a
    module."""
    p = replace(problem(VPLinear()), reward=StandIn())
    net, stand_in = trained(p), StandIn()

    def parameters(critic):
        return {id(w) for w in critic.parameters()}

    of_net, of_stand_in = ({id(w) for w in module.parameters()} for module in (net, stand_in))
    assert parameters(NetworkCritic(p, net)) == of_net
    assert parameters(StructuredCritic(p, net)) == of_net
    assert parameters(StructuredCritic(p, net, reward=stand_in)) == of_net | of_stand_in
    x, T = states(), torch.full((5,), p.horizon)
    close(StructuredCritic(p, net).value(T, x), p.reward(x, None), 1e-12, 1e-12)


@pytest.mark.parametrize("kind", ["network", "structured", "stand-in"])
def test_state_dict_round_trip(kind):
    """A critic saved and loaded into a fresh one has the same values and gradients, and keeps its level."""
    p, x, t = problem(VPLinear()), states(), torch.full((5,), 0.4)

    def make():
        net = trained(p)
        if kind == "network":
            return NetworkCritic(p, net)
        return StructuredCritic(p, net, reward=StandIn() if kind == "stand-in" else None)

    first, second = make(), make()
    first.set_level(torch.tensor(3.0))
    assert not torch.equal(first.value(t, x), second.value(t, x))
    second.load_state_dict(first.state_dict())
    second.set_level(torch.tensor(8.0))
    assert torch.equal(first.value(t, x), second.value(t, x))
    assert torch.equal(first.grad(t, x), second.grad(t, x))
