"""One colour for each method, in every figure; they can be told apart by the colour-blind (Okabe & Ito, Tol).

What is about the same thing shares a colour where the figures are not the same: the actor-critic, its estimator and
Heun's method, which it runs on; adjoint matching and the adjoint; DDPO and its likelihood ratio. What public codes do
has the colour of the method at its best, and is drawn hollow or dashed.
"""

COLOURS = {
    # algorithms
    "actor-critic": "#0072B2",
    "actor-critic-structured": "#44AA99",
    "actor-critic-torchsde": "#332288",
    "path-consistency": "#999933",
    "policy-iteration": "#661100",
    "ppo": "#56B4E9",
    "adjoint-matching": "#009E73",
    "forward-matching": "#332288",
    "awm": "#88CCEE",
    "diffusion-nft": "#DDCC77",
    "flow-grpo": "#882255",
    "td-form": "#56B4E9",
    "next-value": "#CC79A7",
    "ddpo": "#D55E00",
    "ddpo-maruyama": "#F0A000",
    "ddpo-euler": "#D55E00",
    "ddpo-ddim": "#882255",
    "ddpo-2m": "#CC79A7",
    "ddpo-euler-public": "#D55E00",
    "ddpo-ddim-public": "#882255",
    # the continuous-time gradient, by solver
    "Euler, left": "#999999",
    "DDIM, left": "#E69F00",
    "Heun": "#0072B2",
    "2M": "#009E73",
    "exact transitions": "#000000",
    "random times, Heun": "#56B4E9",
    # critics
    "network": "#0072B2",
    "cosine skip": "#44AA99",
    "linear skip": "#D55E00",
    "constant skip": "#CC79A7",
    # estimators
    "critic": "#0072B2",
    "td": "#56B4E9",
    "q-weighted": "#CC79A7",
    "adjoint": "#009E73",
    "likelihood ratio, V baseline": "#E69F00",
    "likelihood ratio, mean baseline": "#D55E00",
}
