"""Algorithms, one short file each. All ask the same of a run (`Context`), and yield the updates they want (`Update`).

actor_critic       the default: replay, corrected critic targets, regression on the greedy action
ppo                a trust region in nats of path KL, by a penalty or pointwise
q_learning         V and q = gamma log pi together, from sampled actions
policy_iteration   evaluate and improve, each to its end
path_consistency   squared residuals of whole trajectories, replayed; reward values alone
adjoint_matching   regression on the action that is greedy for an adjoint; no critic
forward_matching   the denoising loss on its own samples, weighted by their rewards; reward values alone
advantage_matching AWM and DiffusionNFT, the field's own, on forward matching's samples
value_forms        the TD form, and the next value of DxMI, in place of the actor-critic's gradient form
inverse_rl         the reward is learned too, from data; around any of these
kl_budget          beta adapted to a path KL in nats, around any of these
ddpo               the discrete-time baseline
"""

from ctrl.algorithms.actor_critic import ActorCritic
from ctrl.algorithms.adjoint_matching import AdjointMatching
from ctrl.algorithms.advantage_matching import AWM, DiffusionNFT
from ctrl.algorithms.base import Algorithm, Context, Update
from ctrl.algorithms.ddpo import DDPO
from ctrl.algorithms.forward_matching import ForwardMatching
from ctrl.algorithms.inverse_rl import InverseRL
from ctrl.algorithms.kl_budget import KLBudget
from ctrl.algorithms.path_consistency import PathConsistency
from ctrl.algorithms.policy_iteration import PolicyIteration
from ctrl.algorithms.ppo import PPOClip, PPOPenalty
from ctrl.algorithms.q_learning import GaussianNetwork, QLearning
from ctrl.algorithms.value_forms import NextValue, TDForm

__all__ = [
    "AWM",
    "DDPO",
    "ActorCritic",
    "AdjointMatching",
    "Algorithm",
    "Context",
    "DiffusionNFT",
    "ForwardMatching",
    "GaussianNetwork",
    "InverseRL",
    "KLBudget",
    "NextValue",
    "PPOClip",
    "PPOPenalty",
    "PathConsistency",
    "PolicyIteration",
    "QLearning",
    "TDForm",
    "Update",
]
