"""Every code block of the README runs and prints what stands below it, and every name in it exists."""

import importlib
import itertools
import json
import re
from pathlib import Path
from typing import get_type_hints

import pytest
import tyro

import ctrl
from toy import catalogue

ROOT = Path(__file__).parents[1]
README, RESULTS = (ROOT / "README.md").read_text(), ROOT / "benchmarks" / "results"
BLOCKS = re.findall(r"```python\n(.*?)```(?:\n\n[^\n]*\n\n```text\n(.*?)```)?", README, re.DOTALL)


@pytest.mark.parametrize(("block", "printed"), BLOCKS, ids=[block.splitlines()[0] for block, _ in BLOCKS])
def test_block_prints_what_the_readme_says(block, printed, capsys):
    exec(compile(block, "README.md", "exec"), {})
    assert capsys.readouterr().out == printed


def test_its_table_of_faults_is_what_was_measured():
    rows = json.loads((RESULTS / "faults.json").read_text())["rows"]
    table = [f"| {row['fault']} | {row['tried']} | {row['survived']} |" for row in rows]
    assert "\n".join(["| fault | tried | survived |", "|---|---|---|", *table]) in README


def words(script):
    """The arguments of each command of that script."""
    commands = re.findall(rf"python {script}/(\w+)\.py([^`\n]*)", README)
    return [(name, arguments.split()) for name, arguments in commands if name != "NAME"]


@pytest.mark.parametrize(("name", "arguments"), words("benchmarks"), ids=lambda v: " ".join(v) if v != [] else "plain")
def test_a_benchmark_takes_the_options_it_is_called_with(name, arguments):
    main = importlib.import_module(f"benchmarks.{name}").main
    (options, *_) = get_type_hints(main).values()
    assert isinstance(tyro.cli(options, args=arguments), options)


@pytest.mark.parametrize(("name", "arguments"), words("scale"), ids=lambda v: " ".join(v) if v != [] else "plain")
def test_a_command_line_takes_the_options_it_is_called_with(name, arguments, tmp_path, monkeypatch, capsys):
    """On the embedded model, where there is a reward of one's own and a list of prompts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (reward,) = (block for block, _ in BLOCKS if block.startswith("def reward("))
    Path("mymodule.py").write_text(reward)
    Path("prompts.txt").write_text("a red circle on a white ground\n")
    arguments = ["embedded" if "/" in word and before == "--model" else word
                 for before, word in zip([None, *arguments], arguments, strict=False)]  # fmt: skip
    importlib.import_module(f"scale.{name}").main([*arguments, "--dry-run"])
    assert "network calls per epoch: " in capsys.readouterr().out


def rows(name, panel):
    return [row for row in json.loads((RESULTS / f"{name}.json").read_text())["rows"] if row["panel"] == panel]


def test_its_table_of_regrets_is_what_was_measured():
    """To two digits."""
    found = {(r["algorithm"], r["problem"]): r["regret"] for r in rows("algorithms", "regret") if r["steps"] == 20}
    head, _, *lines = re.search(r"\n(\| \| lq-1d .*?)\n\n", README, re.DOTALL)[1].splitlines()
    problems = [f"mixture-{name}" if name.startswith("2d-") else name for name in head.strip("| ").split(" | ")]
    for line in lines:
        algorithm, *cells = line.strip("| ").split(" | ")
        assert [cell.removesuffix(" %") for cell in cells] == [
            f"{100 * found[algorithm, problem]:#.2g}".rstrip(".") for problem in problems
        ]


def test_its_table_of_algorithms_is_what_was_measured():
    """All of them, the best first: regret and its standard error, and trajectories to 10 %."""
    found = [r for r in rows("algorithms", "regret") if r["problem"] == "mixture-2d" and r["steps"] == 20]
    table = []
    for row in sorted(found, key=lambda r: r["regret"]):
        regret, late = f"{100 * row['regret']:.2f} ± {100 * row['regret_se']:.2f} %", row["to_10pct"]
        table.append(f"| {row['algorithm']} | {regret} | {'-' if late is None else f'{late:,.0f}'} |")
    assert "\n".join(table) in README


def test_its_table_of_the_embedded_model_is_what_was_measured():
    """In the order of the table, gains and their standard errors to three digits after the point."""
    said = re.findall(r"\| (\d[\d,]*) \| ([\d.]+ ± [\d.]+) \| ([\d.]+) \|", README)
    found = {
        (f"{r['images']:,}", f"{r['gain']:.3f} ± {r['gain_se']:.3f}", f"{r['path_kl']:.1f}")
        for r in (*rows("sd_tiny", "learning"), *rows("sd_tiny", "half"))
    }
    assert len(said) == len(found) and set(said) == found


SPEED: dict[str, dict[str, str]] = {
    "limit": {
        "sd15, rollout of 32": "rollout of the embedded Stable Diffusion over its bare network passes",
        "cifar10, rollout of 16": "the same of the CIFAR-10 model",
        "mixture-2d, rollout of 4096": "the same on mixture-2d, 4,096 at a time",
        "mixture-2d, rollout of 64": "the same, 64 at a time",
        "sd15, epoch": "an epoch of the embedded Stable Diffusion over the passes of policy and reference in it",
    },
    "solvers": {
        "mixture-2d, torchsde": "rollout over `torchsde.sdeint`, Euler, 128 steps, 4,096 samples",
        "sd15 at guidance 5, diffusers": "rollout over the pipeline's own call, DDIM, 20 steps, 16 pictures",
    },
    "peer": {
        "ddpo, KL off, seconds": "an epoch of DDPO over that of TRL's `DDPOTrainer`, the same work",
        "ddpo, KL off, mebibytes": "its peak memory over TRL's",
        "ddpo with KL, seconds": "the epoch with path KL, 62 calls of the UNet a picture in place of 40",
        "adjoint matching, seconds": "an epoch of adjoint matching, 74 calls",
    },
    "race": {
        f"ours over TRL, N = {n}": f"time of adjoint matching to the reward below over TRL's, N = {n}, at most"
        for n in (20, 50)
    },
}


def test_its_table_of_speeds_is_what_was_measured():
    for panel, cases in SPEED.items():
        found = {row["case"]: row for row in rows("throughput", panel)}
        for case, words in cases.items():
            r = found[case]
            bar = "-" if r["bar"] is None else f"{r['bar']:.2f}" + ("" if r["met"] else ", not met")
            assert f"| {words} | {r['ratio']:.2f} ({r['ratio_min']:.2f} to {r['ratio_max']:.2f}) | {bar} |" in README


def test_what_it_says_of_what_falls_short_is_what_was_measured():
    short = [row["case"] for row in rows("throughput", "limit") if row["met"] is False]
    assert short == ["mixture-2d, rollout of 64"]
    spent = {row["part"]: row["share"] for row in rows("throughput", "profile") if row["case"] == short[0]}
    check_said(f"{100 * spent['arithmetic, memory and Python']:.0f} % of it are arithmetic and Python")


def test_its_table_of_the_race_is_what_was_measured():
    ends = [row for row in rows("throughput", "race") if row["lr"] is not None]
    assert len(ends) == 4
    for r in ends:
        racer, n = r["case"].split(", N = ")
        images = f"{r['images']:,.0f}" + ("" if r["reached"] == r["seeds"] else ", given up")
        numbers = f"{r['seconds']:.0f} ± {r['seconds_se']:.0f} s | {r['gain']:.3f} | {r['path_kl']:.1f}"
        assert f"| {racer} | {n} | {images} | {numbers} |" in README
    found = {row["case"]: row for row in ends}
    for n in (20, 50):
        ours, theirs = (found[f"{side}, N = {n}"] for side in ("adjoint matching", "TRL's DDPO"))
        assert ours["reached"] == ours["seeds"] and theirs["reached"] == 0
        assert theirs["gain"] < ours["goal"] / 2 and theirs["path_kl"] > ours["path_kl"]
    assert {(case[:3], row["updates"]) for case, row in found.items()} == {("TRL", 4), ("adj", 6)}


def test_what_it_says_of_the_search_is_what_was_measured():
    tried = {(row["case"][:3], row["lr"], row["updates"]): row for row in rows("throughput_tuning", "tuning")}
    ours = {lr: row for (side, lr, _), row in tried.items() if side == "adj" and row["reached"] and row["within"]}
    theirs = {key[1:]: row for key, row in tried.items() if key[0] == "TRL"}
    assert set(ours) == {7e-6, 2e-5, 6e-5} and not any(row["reached"] for row in theirs.values())
    assert max((r for r in theirs.values() if r["within"]), key=lambda r: r["gain"]) is theirs[7e-6, 4]
    times, nats = (", ".join(f"{ours[lr][what]:{form}}" for lr in (7e-6, 2e-5)) + f" and {ours[6e-5][what]:{form}}"
                   for what, form in (("seconds", ".0f"), ("path_kl", ".1f")))  # fmt: skip
    check_said(
        f"at 7e-6, 2e-5 and 6e-5, in {times} seconds, for {nats} nats",
        f"{theirs[7e-6, 4]['gain']:.3f} for {theirs[7e-6, 4]['path_kl']:.1f} nats at 7e-6 and four updates",
        f"{theirs[2e-5, 4]['gain']:.3f} for {theirs[2e-5, 4]['path_kl']:.0f} nats at 2e-5",
        f"{theirs[7e-6, 1]['gain']:.3f} for {theirs[7e-6, 1]['path_kl']:.1f} nats at 7e-6 and one update",
    )


def test_what_it_says_of_divergence_is_what_was_measured():
    found = rows("algorithms_sweep", "regret")
    assert {(r["problem"], r["steps"]) for r in found} == set(itertools.product(catalogue.NAMES, (10, 20, 50, 100)))
    worst = max(found, key=lambda r: r["regret_worst"])
    check_said(
        f"{sum(r['diverged'] for r in found)} of {sum(r['seeds'] for r in found)} runs diverge",
        f"the worst regret of any is {100 * worst['regret_worst']:.0f} %,",
        f"on {worst['problem']} at N = {worst['steps']}.",
    )


def check_said(*words: str) -> None:
    """Whatever the line breaks."""
    text = " ".join(README.split())
    assert [w for w in words if w not in text] == []


def test_what_it_says_of_growth_is_what_was_measured():
    power = {row["case"]: f"{row['ratio']:.2f}" for row in rows("throughput", "exponents")}
    check_said(
        f"time grows with the number of steps to the power {power['seconds against steps']}",
        f"with the nodes of an update to the power {power['seconds against nodes']}",
        f"memory with the batch to the power {power['mebibytes against batch']}",
        f"with the steps to the power {power['mebibytes against steps']}:",
    )


def test_its_table_of_forms_is_what_was_measured():
    """All of them, and the best untuned sampler before."""
    untuned = {row["sampler"]: row["frechet"] for row in rows("cifar10", "untuned")}
    by_2m = untuned.pop("2m")
    best = min(untuned, key=untuned.get)
    table = [
        f"| {r['algorithm']} | {r['frechet']:.2f} ± {r['frechet_se']:.2f} | {r['frechet_ode']:.2f} ± "
        f"{r['frechet_ode_se']:.2f} | {r['path_kl']:.1f} | {100 * r['largest_class']:.0f} % |"
        for r in rows("cifar10", "forms")
    ]
    assert "\n".join(table) in README
    assert f"UniPC, has {untuned[best]:.2f} and 2M {by_2m:.2f}:" in README and best == "unipc"
    forms = {r["algorithm"]: r for r in rows("cifar10", "forms")}
    below = [sorted((at - r["frechet"]) / r["frechet_se"] for r in forms.values()) for at in (untuned[best], by_2m)]
    calls = sorted(r["network_calls"] for r in forms.values())
    assert forms["ddpo"]["path_kl"] / forms["actor-critic"]["path_kl"] == pytest.approx(17, abs=0.5)
    check_said(
        f"than UniPC by {below[0][0]:.1f} to {below[0][-1]:.0f} standard errors",
        f"than untuned 2M by {below[1][0]:.1f} to {below[1][-1]:.1f}.",
        f"calls are {calls[0] / 1000:.0f} thousand (DDPO, which has no critic) to {calls[-1] / 1000:.0f} thousand.",
    )


def test_what_it_says_of_the_default_runs_is_what_was_measured():
    runs = {row["run"]: row for row in rows("pictures", "evaluation")}
    sd, cifar = runs["sd15"], runs["cifar10"]
    gap = sd["ceiling"] - sd["reward_before"]
    check_said(
        f"closes {100 * sd['gain'] / gap:.0f} % (standard error {100 * sd['gain_se'] / gap:.1f} %) of the way from ",
        f"from {sd['reward_before']:.2f} to the {sd['ceiling']:.2f} that",
        f"for {sd['path_kl']:.1f} nats of path KL (`python benchmarks/pictures.py`)",
        f"goes from {sd['other_before']:.2f} to {sd['other_after']:.2f}.",
        f"goes from {cifar['reward_before']:.2f} to {cifar['reward_after']:.2f}, where the best untuned sampler at as ",
        f"many steps, UniPC, has {cifar['reward_best_untuned']:.2f}: a gain of {cifar['gain']:.2f} ± ",
        f": a gain of {cifar['gain']:.2f} ± {cifar['gain_se']:.2f}",
        f"for {cifar['path_kl']:.2f} nats of path KL.",
        f"goes from {cifar['frechet_before']:.1f} to {cifar['frechet_after']:.1f}:",
    )
    assert cifar["best_untuned"] == "unipc" and cifar["samples"] == 256


def test_its_pictures_are_there():
    for file in re.findall(r"!\[[^]]*\]\(([^)]*)\)", README):
        assert (ROOT / file).is_file()
    for name in re.findall(r"^\| `(\w+)\.py` \|", README, re.MULTILINE):
        assert (ROOT / "paper_figures" / f"{name}.py").is_file()


def test_it_names_every_problem():
    for name in catalogue.NAMES:
        assert name in README


def test_every_name_it_gives_exists():
    for name in re.findall(r"`ctrl\.([a-zA-Z_]+)`", README):
        assert hasattr(ctrl, name) or importlib.import_module(f"ctrl.{name}"), name
