"""Exploratory stochastic control for diffusion models, in continuous time.

    dX = [b0 + B a] dt + S dW,   J = E[r(X_T) - integral of c dt],   c = l + ½ |a - a_ref|²_R - gamma Ent(pi)

noising    X_s = alpha X_0 + sigma eps                    problem   b0, B, S, R, a_ref, r; ScoreAsAction
gaussian   N(mean, L L'), policies                        noise     randomness keyed by sample
grids      times and quadrature weights                   solvers   one step each
rollout    simulate -> Trajectory                         regularize  path KL, chain KL
value      critics                                        qvalue    advantage rate, greedy policy, residuals
gradient   policy gradients from trajectories             evaluation  targets for critics
nodes      what learners see of trajectories         algorithms  one short file each
bridge     to torchsde and back                      estimate  standard errors, z-scores, orders
forward    the likelihood ratio of an end, eta = 1   decided   how much of a reward is decided by when
fit        the way in to `training`: how a run is made
"""

from ctrl import grids
from ctrl.estimate import Estimate, fit_order, z_bound
from ctrl.gaussian import Gaussian, GaussianPolicy, Mean
from ctrl.linop import LinOp, Matrix, Scalar
from ctrl.noise import Noise
from ctrl.noising import VE, VP, Noising, RectifiedFlow, VPCosine, VPLinear, VPTable
from ctrl.problem import IsotropicNormal, ProbabilityFlow, Problem, ScoreAsAction
from ctrl.qvalue import advantage_rate, greedy, greedy_policy, martingale_residual, td_residual
from ctrl.regularize import chain_kl, kl_rate, path_kl
from ctrl.rollout import NotFinite, Trajectory, rollout
from ctrl.solvers import DDIM, EulerMaruyama, Exact, Exponential, Heun, IntegratedEuler, LinearStep, Multistep2, Solver
from ctrl.value import COSINE, LINEAR, Critic, NetworkCritic, Skip, StructuredCritic

__all__ = [
    "COSINE",
    "DDIM",
    "LINEAR",
    "VE",
    "VP",
    "Critic",
    "Estimate",
    "EulerMaruyama",
    "Exact",
    "Exponential",
    "Gaussian",
    "GaussianPolicy",
    "Heun",
    "IntegratedEuler",
    "IsotropicNormal",
    "LinOp",
    "LinearStep",
    "Matrix",
    "Mean",
    "Multistep2",
    "NetworkCritic",
    "Noise",
    "Noising",
    "NotFinite",
    "ProbabilityFlow",
    "Problem",
    "RectifiedFlow",
    "Scalar",
    "ScoreAsAction",
    "Skip",
    "Solver",
    "StructuredCritic",
    "Trajectory",
    "VPCosine",
    "VPLinear",
    "VPTable",
    "advantage_rate",
    "chain_kl",
    "fit_order",
    "greedy",
    "greedy_policy",
    "grids",
    "kl_rate",
    "martingale_residual",
    "path_kl",
    "rollout",
    "td_residual",
    "z_bound",
]
