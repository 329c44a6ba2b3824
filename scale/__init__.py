"""Pretrained diffusion models as control problems, trained by the same `ctrl.fit` as the toy problems.

diffusion  diffusers' Stable Diffusion -> noising, score, conditions, reward, critic networks; the only adapter

Nothing here is control theory: a process, networks, a reward and data are handed to `ctrl`, which does the rest.
"""
