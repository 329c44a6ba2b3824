"""On the embedded Stable Diffusion: reward by pictures drawn, and what is left of the gain by sampler and steps.

From sd_tiny.json, panels `curve` and `samplers` (python benchmarks/sd_tiny.py).
"""

from __future__ import annotations

import sys
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it stands beside the package, not in it

from paper_figures.drawing import main
from paper_figures.results import Results, Row, grouped
from paper_figures.style import COLOURS, DOUBLE, legend_below, line, ticks

WIDER = 2.4
"""The panel of learning, over one of a sampler."""


def draw(results: Results) -> Figure:
    """A row a reward: left, the reward in training, a line a seed; then, a panel a sampler, the gain in evaluation at
    each number of steps, with one standard error over seeds."""
    rewards = grouped(results.rows("sd_tiny", "curve"), "reward")
    samplers = {reward: grouped(results.rows("sd_tiny", "samplers", reward=reward), "sampler") for (reward,) in rewards}
    count = max(map(len, samplers.values()))
    figure = Figure(figsize=(DOUBLE, 2.3 * len(rewards) + 0.3), layout="constrained")
    axes = figure.subplots(len(rewards), 1 + count, squeeze=False, width_ratios=[WIDER] + [1] * count)
    for (first, *others), ((reward,), curves) in zip(axes, rewards.items(), strict=True):
        learning(first, curves, reward)
        for ax, ((sampler,), rows) in zip(others, samplers[reward].items(), strict=False):
            gains(ax, rows, sampler)
            ax.sharey(others[0])
            ax.tick_params(labelleft=ax is others[0])
        others[0].set_ylabel("gain (mean ± s.e.)")
    legend_below(figure, axes[:, 0], 3)
    return figure


def learning(ax: Axes, rows: list[Row], reward: str) -> None:
    """A line a seed."""
    for (method, _), curve in grouped(rows, "algorithm", "seed").items():
        images, value = [row["images"] for row in curve], [row["value"] for row in curve]
        ax.plot(images, value, color=COLOURS[method], linewidth=0.9, label=method)
    ax.set(title=f"{reward}, a line a seed", xlabel="pictures drawn", ylabel="reward in training\n(mean of 5 epochs)")


def gains(ax: Axes, rows: list[Row], sampler: str) -> None:
    """A line a method, each a little to the right of the one before, so that bars can be told apart."""
    for i, ((method,), some) in enumerate(grouped(rows, "algorithm").items()):
        line(ax, [{**row, "at": row["steps"] * 1.08**i} for row in some], "at", "gain", method, "gain_se")
    ticks(ax, {row["steps"] for row in rows})
    ax.axhline(0.0, color="0.4", linewidth=0.6)
    ax.set(title=sampler, xlabel="steps")


if __name__ == "__main__":
    main(__file__, draw)
