"""What happens to runs that take days, done to short ones on purpose: is anything lost?

Each fault is tried on a run of `ctrl.fit` (actor-critic on mixture-2d: averaged policy, trajectories in store, a
checkpoint every epoch) or of `scale/sd15.py` on the embedded model. It is survived if the run, gone on with, ends as
the one to which nothing happened: policy, critic, average, optimisers and trajectories in the last checkpoint bitwise
equal, and the same metrics, no line lost or doubled. Where nothing can be gone on with, an error that says so is what
is wanted, and anything else is not survival.

    python benchmarks/faults.py            about a quarter of an hour on two cores
    python benchmarks/faults.py --quick
"""

from __future__ import annotations

import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import tyro
from accelerate import Accelerator
from safetensors.torch import load_file
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it stands beside the package, not in it

from benchmarks.report import Options, Row, table, write
from ctrl import NetworkCritic
from ctrl.algorithms import ActorCritic, Algorithm
from ctrl.algorithms.base import Context, Update
from ctrl.fit import Result, Run, Settings, fit
from ctrl.training import files
from toy import catalogue
from toy.networks import Policy, Value

NAME = "faults"
ROOT = Path(__file__).parents[1]
EPOCHS = 12
EMBEDDED = ROOT / "scale" / "assets" / "tiny-sd.yaml"
PATIENCE = 900
"""Seconds after which a process that should have ended hangs."""


@dataclass(frozen=True)
class FaultOptions(Options):
    """What this benchmark can be asked for."""

    kills: int = 20
    """Moments at which the toy run is killed."""
    kills_sd: int = 5
    """Moments at which the embedded Stable Diffusion's run is."""
    damages: int = 50
    """Checkpoints that are cut, and checkpoints with a bit turned."""


# ------------------------------------------------------------------------------------------ the runs


def toy(
    out: Path, *, width: int = 16, reward: Callable[..., Any] | None = None, callbacks: Any = (),
    algorithm: Algorithm | None = None, accelerator: Accelerator | None = None, **changes: Any,
) -> Result:  # fmt: skip
    """The short run on mixture-2d; it goes on from what is there."""
    torch.manual_seed(0)
    problem: Any = catalogue.get("mixture-2d").problem
    given = problem if reward is None else replace(problem, reward=reward)
    settings = {"epochs": EPOCHS, "samples": 24, "steps": 6, "ema": 0.9, "checkpoint_every": 1, "progress": False}
    return fit(
        given, Policy(problem, width), algorithm or ActorCritic(3, 3, 64, keep=4),
        critic=NetworkCritic(problem, Value(problem, width)), settings=Settings(out=out, **{**settings, **changes}),
        callbacks=callbacks, resume=True, accelerator=accelerator,
    )  # fmt: skip


def toy_process(out: Path, limit: int | None = None, epoch: int = 0, fault: str = "") -> subprocess.Popen[str]:
    """The same in a process of its own; no file may be longer than `limit` bytes after an epoch."""
    code = f"from benchmarks import faults; faults.toy_in_process({str(out)!r}, {limit}, {epoch}, {fault!r})"
    return started([sys.executable, "-c", code])


def toy_in_process(out: str, limit: int | None = None, epoch: int = 0, fault: str = "") -> None:
    """What that process does. fault: of the second process's reward in the fourth epoch, "raises" or "not finite"; or
    "slow", two seconds per epoch from the second on; or "overflow", gradients that float16 cannot hold at any scale."""
    torch.set_num_threads(1)
    good, calls = catalogue.get("mixture-2d").problem.reward, 0

    def reward(x: torch.Tensor, cond: Any = None) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if fault == "slow" and calls > 1:
            time.sleep(2)
        sick = fault in REWARDS and calls == 4 and os.environ["RANK"] == "1"
        return REWARDS[fault][0](good(x, cond)) if sick else good(x, cond)

    def narrow(run: Run, metrics: dict[str, Any]) -> None:
        if limit is not None and run.epoch == epoch:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    overflow = {"algorithm": poisoned(lambda *_: 2.0**60), "accelerator": half()} if fault == "overflow" else {}
    toy(Path(out), callbacks=[narrow], reward=reward, **overflow)


def half() -> Accelerator:
    """float16 on a CPU, where accelerate has neither autocast nor a scaler of gradients."""
    accelerator = Accelerator(mixed_precision="fp16", cpu=True)
    accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu")
    return accelerator


def sd_process(out: Path, *changes: str) -> subprocess.Popen[str]:
    """Fine-tuning of the embedded Stable Diffusion, by its command."""
    words = (
        "--resume --epochs 4 --samples 8 --steps 3 --checkpoint-every 1 --pictures-every 0 --eval-samples 2 "
        "--eval-headline 2 --eval-steps 2 --eval-grid-samples 2 --ema 0.9 --log-with none"
    )
    return started([sys.executable, str(ROOT / "scale" / "sd15.py"), *words.split(), "--out", str(out), *changes])


def started(command: list[str]) -> subprocess.Popen[str]:
    """A process in a group of its own, on one thread, what it says in one pipe."""
    extra = {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen(
        command, env={**os.environ, **extra}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True, cwd=ROOT,
    )  # fmt: skip


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit status, and what it said."""
    said, _ = process.communicate(timeout=PATIENCE)
    return process.returncode, said


def same(a: Path, b: Path) -> bool:
    """Whether two runs ended alike: bit by bit, and line by line but for the time that things took."""
    ends = [files.newest(out) for out in (a, b)]
    if None in ends or len({end.name for end in ends if end}) > 1:
        return False
    held = [
        sorted(f.name for f in end.glob("*") if f.suffix == ".safetensors" or f.stem.endswith("-optimizer"))
        for end in ends
        if end
    ]
    return held[0] == held[1] and records(a) == records(b) and all(_alike(ends[0] / f, ends[1] / f) for f in held[0])  # type: ignore[operator]


def _alike(a: Path, b: Path) -> bool:
    if a.suffix == ".pt":
        x, y = (torch.load(f, weights_only=True) for f in (a, b))
        return str(x) == str(y) and all(
            torch.equal(v, w)
            for p, q in zip(x["state"].values(), y["state"].values(), strict=True)
            for v, w in zip(p.values(), q.values(), strict=True)
        )
    x, y = load_file(a), load_file(b)
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


def records(out: Path) -> list[dict[str, Any]]:
    """The metrics but for the seconds."""
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


# ------------------------------------------------------------------------------------------ faults


@dataclass
class Ground:
    """Where faults are tried.

    Attributes:
        folder: temporary. In it `whole` is the toy run to which nothing happened, and `short` a shorter one.
        rng: what is random here.
    """

    folder: Path
    rng: random.Random
    count: int = 0

    @property
    def whole(self) -> Path:
        """The toy run to which nothing happened."""
        return self.folder / "whole"

    @cached_property
    def whole_sd(self) -> Path:
        """That of the embedded Stable Diffusion."""
        status, said = ended(sd_process(self.folder / "whole_sd"))
        if status:
            raise RuntimeError(said)
        return self.folder / "whole_sd"

    @staticmethod
    def of(folder: Path, seed: int) -> Ground:
        """Makes the run to which nothing happens."""
        toy(folder / "whole")
        toy(folder / "short", epochs=4, schedule=tail, keep_checkpoints=2)
        return Ground(folder, random.Random(seed))

    def place(self, copy: str | None = None) -> Path:
        """A new folder, or a copy of one."""
        self.count += 1
        place = self.folder / f"{self.count:04d}"
        if copy is not None:
            shutil.copytree(self.folder / copy, place)
        return place


def tail(progress: float) -> float:
    """A schedule that does not depend on how long the run is."""
    return 1.0


def killed(ground: Ground, n: int) -> bool:
    """The toy run."""
    return kill(ground, toy_process, ground.whole, n)


def killed_sd(ground: Ground, n: int) -> bool:
    """The embedded Stable Diffusion's."""
    return kill(ground, sd_process, ground.whole_sd, n)


def kill(ground: Ground, make: Callable[[Path], subprocess.Popen[str]], whole: Path, n: int) -> bool:
    """`kill -9` after the first epoch, the odd times while a checkpoint is being written; then on to the end."""
    out = ground.place()
    seconds = [json.loads(line)["seconds"] for line in (whole / "metrics.jsonl").read_text().splitlines()]
    process, part = make(out), n % 2 == 1
    wait_for((out / "metrics.jsonl").exists, process)
    at = time.monotonic() + ground.rng.uniform(0, sum(seconds[1:-1]))
    while time.monotonic() < at and process.poll() is None:
        time.sleep(0.001)
    if part:
        wait_for(lambda: any((out / "checkpoints").glob("*.part")), process, 0.0005)
    if process.poll() is not None:
        raise RuntimeError(f"the run had ended ({process.returncode}) before it was to be killed: {ended(process)[1]}")
    os.killpg(process.pid, signal.SIGKILL)
    ended(process)
    return ended(make(out))[0] == 0 and same(out, whole)


def wait_for(there: Callable[[], bool], process: subprocess.Popen[str], every: float = 0.005) -> None:
    """Until it is there, or the process has ended."""
    while process.poll() is None and not there():
        time.sleep(every)


def signalled(ground: Ground, n: int, number: int, twice: bool) -> bool:
    """SIGTERM or SIGINT: exit status 128 + signal with the epoch kept, or at once at the second; then on to the end."""
    out = ground.place()
    process = toy_process(out, fault="slow" if twice else "")
    wait_for((out / "metrics.jsonl").exists, process)
    process.send_signal(number)
    if twice:
        assert process.stdout is not None
        while "once more to end it" not in process.stdout.readline() and process.poll() is None:
            pass
        process.send_signal(number)
    status, said = ended(process)
    right = status == -number if twice else status == 128 + number and "is kept" in said
    return right and ended(toy_process(out))[0] == 0 and same(out, ground.whole)


def damaged(ground: Ground, n: int, damage: Callable[[random.Random, Path], None], on: int) -> bool:
    """One file of the newest checkpoint is damaged: the one before serves, with a warning, to the same end (which is
    looked at `on` times); and with both damaged there is an error."""
    out = ground.place("short")
    last, before = files.folders(out)[:2]
    damage(ground.rng, ground.rng.choice(sorted(last.iterdir())))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = files.newest(out)
        if n < on:
            toy(out, epochs=4, schedule=tail, keep_checkpoints=2)
    right = found == before and any("passed over" in str(w.message) for w in said)
    if n < on:
        return right and same(out, ground.folder / "short")
    damage(ground.rng, ground.rng.choice(sorted(before.iterdir())))
    for folder in files.folders(out)[2:]:
        shutil.rmtree(folder)
    return right and refused(lambda: toy(out, epochs=4, schedule=tail), "is whole: begin in another folder")


def cut(rng: random.Random, file: Path) -> None:
    """Its end is missing."""
    os.truncate(file, rng.randrange(file.stat().st_size))


def turn(rng: random.Random, file: Path) -> None:
    """One bit is another."""
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def empty(rng: random.Random, file: Path) -> None:
    """Nothing is in it."""
    file.write_bytes(b"")


def lose(rng: random.Random, file: Path) -> None:
    """It is not there."""
    file.unlink()


def refused(f: Callable[[], Any], message: str) -> bool:
    """Whether it ends in an error that says so."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            f()
    except (ValueError, RuntimeError) as wrong:
        return message in str(wrong)
    return False


def another(ground: Ground, n: int, message: str, **changes: Any) -> bool:
    """A whole checkpoint of another run."""
    return refused(lambda: toy(ground.place("short"), epochs=4, schedule=tail, **changes), message)


def another_version(ground: Ground, n: int) -> bool:
    """A whole checkpoint of another format."""
    out = ground.place("short")
    folder = files.folders(out)[0]
    file = folder / files.PROGRESS
    progress = json.loads(file.read_text())
    progress["must_agree"]["format"] = 1
    file.write_text(json.dumps(progress))
    (folder / files.MANIFEST).write_text(json.dumps(files.manifest(folder)))
    return refused(lambda: toy(out, epochs=4, schedule=tail), "format = 1, this run has")


def full_disk(ground: Ground, n: int) -> bool:
    """From some epoch on no file can grow beyond some size, less than the optimiser's, or, the odd times, than the
    metrics': the run says so, and goes on to the end where there is room."""
    out, epoch = ground.place(), ground.rng.randrange(2, EPOCHS - 2)
    sizes = (200, 600) if n % 2 else (8_000, 12_000)
    status, said = ended(toy_process(out, ground.rng.randrange(*sizes), epoch))
    right = status == 1 and ("metrics.jsonl" if n % 2 else "the checkpoint of epoch") + " " in said and "whole" in said
    return right and ended(toy_process(out))[0] == 0 and same(out, ground.whole)


def failing_reward(ground: Ground, n: int, fault: Callable[[torch.Tensor], Any], message: str) -> bool:
    """In the eighth epoch the reward fails, seven are kept, though a checkpoint was not due; mended, the run goes on to
    the same end."""
    out, good, calls = ground.place(), catalogue.get("mixture-2d").problem.reward, 0

    def reward(x: torch.Tensor, cond: Any = None) -> Any:
        nonlocal calls
        calls += 1
        return fault(good(x, cond)) if calls == 8 else good(x, cond)

    right = refused(lambda: toy(out, reward=reward, checkpoint_every=5, patience=1), message)
    newest = files.newest(out)
    toy(out)
    return right and newest is not None and newest.name == "epoch-000007" and same(out, ground.whole)


def unreachable(r: torch.Tensor) -> torch.Tensor:
    """A service that is down."""
    raise ConnectionError("no answer")


REWARDS: dict[str, tuple[Callable[[torch.Tensor], Any], str]] = {
    "raises": (lambda r: ask(unreachable, r), "no answer"),
    "hangs": (lambda r: ask(lambda v: time.sleep(60), r, timeout=0.2), "no answer within 0.2 seconds"),
    "wrong shape": (lambda r: ask(lambda v: v[:3], r), "must return a tensor of shape"),
    "wrong dtype": (lambda r: ask(lambda v: v.long(), r), "must return floating-point numbers"),
    "not finite": (lambda r: ask(lambda v: v / 0, r), "for picture 0"),
    "gradient": (lambda r: ask(lambda v: v + torch.zeros(1, requires_grad=True), r), "return it detached"),
}  # fmt: skip


def ask(reward: Callable[[torch.Tensor], Any], r: torch.Tensor, timeout: float | None = None) -> torch.Tensor:
    """By the protocol of scale: r stands for pictures."""
    from scale import rewards
    from scale.prompts import Prompt

    patient = rewards.Patient(lambda images, prompts, metadata: reward(images), timeout=timeout)
    with torch.enable_grad():
        return rewards.ask(patient, r, [Prompt("it")] * len(r))


def retried(ground: Ground, n: int) -> bool:
    """A reward that fails twice and then answers, with two retries: as if nothing had been."""
    from scale import rewards

    out, good, calls = ground.place(), catalogue.get("mixture-2d").problem.reward, 0

    def flaky(x: torch.Tensor, cond: Any, metadata: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return unreachable(x) if calls % 5 in (1, 2) else good(x, cond)

    patient = rewards.Patient(flaky, retries=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        toy(out, reward=lambda x, cond=None: patient(x, cond, None))
    return calls > EPOCHS and same(out, ground.whole)


class Poisoned(ActorCritic):
    """Its policy's losses are multiplied by factor(epoch, n) in the n-th update of an epoch, n = 1, 2, ..."""

    factor: Callable[[int, int], float] = staticmethod(lambda epoch, n: 1.0)

    def learn(self, run: Context) -> Iterator[Update]:
        done = 0
        for update in super().learn(run):
            done += update.name == "policy"
            factor = self.factor(run.noise.epoch, done) if update.name == "policy" else 1.0
            yield replace(update, loss=partial(self.scaled, update.loss, factor))

    @staticmethod
    def scaled(loss: Any, factor: float, nodes: Any) -> Any:
        """factor loss."""
        return factor * loss(nodes)


def poisoned(factor: Callable[[int, int], float]) -> Poisoned:
    """With the toy run's own numbers."""
    algorithm = Poisoned(3, 3, 64, keep=4)
    object.__setattr__(algorithm, "factor", factor)
    return algorithm


def not_a_number(ground: Ground, n: int, bad: tuple[int, ...]) -> bool:
    """Two updates in a row are left out, named and kept, and the run ends well; three end it."""
    out = ground.place()
    algorithm = poisoned(lambda epoch, n: torch.nan if epoch == 5 and n in bad else 1.0)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if len(bad) == 3:
            right = refused(lambda: toy(out, algorithm=algorithm), "policy: the loss is nan at step")
        else:
            right = all(bool(p.isfinite().all()) for p in toy(out, algorithm=algorithm).policy.parameters())
            right = right and sum("policy: the loss is nan at step" in str(w.message) for w in said) == len(bad)
    return right and len(list((out / "not-finite").glob("epoch-000006-policy-*.safetensors"))) == len(bad)


def overflow(ground: Ground, n: int) -> bool:
    """Gradients overflow float16 at every scale: once the scale is below 1 each is a strike, and the third ends the run
    with an error that names them; the metrics until then are finite, and kept."""
    out = ground.place()
    status, said = ended(toy_process(out, fault="overflow"))
    finite = all(math.isfinite(v) for line in records(out) for v in line.values())
    right = status == 1 and "policy: the gradient of" in said and "(3 in a row)" in said
    return right and finite and files.newest(out) is not None


def two_runs(ground: Ground, n: int) -> bool:
    """The toy run."""
    return alone(ground, partial(toy_process, fault="slow"), ground.whole, n)


def two_runs_sd(ground: Ground, n: int) -> bool:
    """The embedded Stable Diffusion's."""
    return alone(ground, sd_process, ground.whole_sd, n)


def alone(ground: Ground, make: Callable[[Path], subprocess.Popen[str]], whole: Path, n: int) -> bool:
    """A second run in the folder of one that is going on, the odd times begun at the same moment: one of them is
    refused, with the process that holds the folder, and the other ends as if alone."""
    out = ground.place()
    runs = [make(out)]
    if n % 2 == 0:
        wait_for((out / "metrics.jsonl").exists, runs[0])
    runs.append(make(out))
    ends = [ended(run) for run in runs]
    if sorted(status for status, _ in ends) != [0, 1]:
        return False
    (holder,) = (run.pid for run, (status, _) in zip(runs, ends, strict=True) if status == 0)
    (said,) = (said for status, said in ends if status == 1)
    return f"is in use by process {holder} on" in said and same(out, whole)


def lost_checker(ground: Ground, n: int) -> bool:
    """The model has a safety checker, whose files are gone when the run ends, or, the odd times, never were there: the
    run ends well all the same, with a pipeline that diffusers loads and its evaluation."""
    from diffusers import StableDiffusionPipeline
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    model, out = ground.place(), ground.place()
    shutil.copytree(EMBEDDED.with_suffix(""), model)
    checker = model / "safety_checker"
    if n % 2 == 0:
        small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        StableDiffusionSafetyChecker(CLIPConfig(vision_config=small, projection_dim=8)).save_pretrained(checker)
        CLIPImageProcessor().save_pretrained(model / "feature_extractor")
    index = json.loads((model / "model_index.json").read_text()) | {
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "feature_extractor": ["transformers", "CLIPImageProcessor"], "requires_safety_checker": True,
    }  # fmt: skip
    (model / "model_index.json").write_text(json.dumps(index))
    process = sd_process(out, "--config", str(EMBEDDED), "--model", str(model))
    wait_for((out / "metrics.jsonl").exists, process)
    shutil.rmtree(checker, ignore_errors=True)
    if ended(process)[0] or not (out / "evaluation.json").is_file():
        return False
    tuned = StableDiffusionPipeline.from_pretrained(out / "pipeline").unet.state_dict()
    untuned = load_file(model / "unet" / "diffusion_pytorch_model.safetensors")
    return any(not torch.equal(tuned[name], v) for name, v in untuned.items()) and same(out, ground.whole_sd)


def two_processes(ground: Ground, out: Path, fault: str = "") -> subprocess.Popen[str]:
    """The toy run on two processes."""
    script = ground.folder / "two.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        f"from benchmarks import faults; faults.toy_in_process({str(out)!r}, fault={fault!r})\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    return started([*launch, "--local_addr", "localhost", str(script)])


def both_went_on(ground: Ground, out: Path) -> bool:
    """Whether two processes go on to the end, with a checkpoint of both."""
    right = ended(two_processes(ground, out))[0] == 0 and len(records(out)) == EPOCHS
    return right and len(list(files.folders(out)[0].glob("replay-*"))) == 2


def dead_worker(ground: Ground, n: int) -> bool:
    """One of two processes is killed: the other does not wait for ever, the launcher says what happened, and the run
    goes on to the end."""
    out = ground.place()
    process = two_processes(ground, out)
    wait_for((out / "metrics.jsonl").exists, process)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout
    os.kill(int(children.split()[-1]), signal.SIGKILL)
    status, said = ended(process)
    return status != 0 and "SIGKILL" in said and both_went_on(ground, out)


def one_reward(ground: Ground, n: int, fault: str) -> bool:
    """The reward of one of two processes fails in the fourth epoch. If it raises, both end, with three epochs kept; if
    it is no number, both leave the epoch out and go on."""
    out = ground.place()
    status, said = ended(two_processes(ground, out, fault))
    if fault == "raises":
        newest = files.newest(out)
        right = status != 0 and "no answer" in said and newest is not None and newest.name == "epoch-000003"
    else:
        lines = records(out)
        right = status == 0 and "left out" in said and ["reward" in line for line in lines].index(False) == 3
    return right and both_went_on(ground, out)


# ------------------------------------------------------------------------------------------ the table


@dataclass(frozen=True)
class Fault:
    """trial(ground, n) -> survived, for n = 0, 1, ..., times - 1."""

    name: str
    times: int
    trial: Callable[[Ground, int], bool]


def faults(o: FaultOptions) -> list[Fault]:
    """All that can be done to a run here."""
    kills, kills_sd, damages, few = (2, 0, 6, 1) if o.quick else (o.kills, o.kills_sd, o.damages, 3)
    others: dict[str, tuple[str, dict[str, Any]]] = {
        "model": ("shapes = ", {"width": 8}), "seed": ("seed = 0, this run has 1", {"seed": 1}),
        "algorithm": ("algorithm = ActorCritic, this run has", {"algorithm": poisoned(lambda *_: 1.0)}),
    }  # fmt: skip
    return [
        Fault("kill -9, toy run", kills, killed),
        Fault("kill -9, scale/sd15.py", kills_sd, killed_sd),
        *(
            Fault(f"{number.name}{', twice' * twice}", few, partial(signalled, number=number, twice=twice))
            for number, twice in product((signal.SIGTERM, signal.SIGINT), (False, True))
        ),
        *(
            Fault(f"checkpoint's file {name}", damages, partial(damaged, damage=damage, on=few))
            for name, damage in (("cut short", cut), ("with a bit turned", turn), ("emptied", empty), ("missing", lose))
        ),
        *(Fault(f"checkpoint of another {n}", 1, partial(another, message=m, **c)) for n, (m, c) in others.items()),
        Fault("checkpoint of another version", 1, another_version),
        Fault("disk full", few, full_disk),
        *(Fault(f"reward: {n}", 1, partial(failing_reward, fault=f, message=m)) for n, (f, m) in REWARDS.items()),
        Fault("reward: fails, asked again", 1, retried),
        Fault("loss not a number, twice in a row", 1, partial(not_a_number, bad=(1, 2))),
        Fault("loss not a number, three times in a row", 1, partial(not_a_number, bad=(1, 2, 3))),
        Fault("float16 overflows without end", 1, overflow),
        Fault("two runs in one folder, toy run", few, two_runs),
        Fault("two runs in one folder, scale/sd15.py", min(kills_sd, 2), two_runs_sd),
        Fault("safety checker gone at the end", min(kills_sd, 2), lost_checker),
        Fault("one of two processes killed", 1, dead_worker),
        Fault("reward of one of two processes: raises", 1, partial(one_reward, fault="raises")),
        Fault("reward of one of two processes: not finite", 1, partial(one_reward, fault="not finite")),
    ]


def main(o: FaultOptions) -> list[Row]:
    """Try all, print, write."""
    began = time.perf_counter()
    rows: list[Row] = []
    torch.set_num_threads(1)
    listed = faults(o)
    with (
        tempfile.TemporaryDirectory() as folder,
        tqdm(total=sum(fault.times for fault in listed), desc="faults") as bar,
    ):
        ground = Ground.of(Path(folder), o.seed)
        for fault in listed:
            survived = 0
            for n in range(fault.times):
                survived += fault.trial(ground, n)
                bar.update()
            if fault.times:
                rows.append({"fault": fault.name, "tried": fault.times, "survived": survived})
    print(table(rows, ["fault", "tried", "survived"]))
    print("->", write(NAME, o, rows, began))
    return rows


if __name__ == "__main__":
    main(tyro.cli(FaultOptions, description=__doc__))
