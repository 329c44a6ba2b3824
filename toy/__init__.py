"""Problems with exact answers: what an algorithm is checked against.

lq          linear-quadratic control, matrices and exploration: V, J, grad J, optimum, moments, by Riccati and
Lyapunov ODEs
gaussian    Gaussian data under score as action, in closed form for every eta
mixture     Gaussian mixtures, in closed form at eta = 1
pde         1-D: anything, by backward-Kolmogorov and HJB equations
chain       exact moments of any solver's discrete chain, by running the solver itself on a basis
catalogue   named, frozen problems with their exact answers
"""
