"""Rewards of pictures: reward(images, prompts, metadata) -> (n,).

    images: (n, 3, H, W) in [0, 1], float32; prompts: n strings; metadata: n dictionaries, empty where there are none.

A reward returns a tensor, an array or a list, (n,), or a pair of one of these and information, which is dropped: so do
the reward functions of TRL's DDPOTrainer.

`reward_of` reads what a user writes: a name, `name=model` for another model than the usual one, `module:function`, and
weighted sums of these, such as "pickscore + 0.1 * jpeg-compressibility". A larger number is better. A reward may say
`differentiable = True`, if its gradient reaches the images, and `ceiling(prompts)`, the most that can be had. One with
a gradient is called again when that is taken (`scale.diffusion.Decoded`), and must give the same numbers then.
"""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ctrl import NotFinite
from ctrl.fields import one_of
from ctrl.training.interrupts import RunFailed
from scale import reward_worker, shapes
from scale.aesthetic import Aesthetic, ClipScore, ImageReward, read_hps
from scale.classifiers import LogProbability
from scale.prompts import Prompt

Metadata = Sequence[dict[str, Any]]
Reward = Callable[[Tensor, list[str], Metadata], Tensor]


def ceiling_of(reward: Reward, prompts: Sequence[Prompt]) -> float | None:
    """The most that can be had on these prompts, if the reward knows: reward.ceiling(texts)."""
    known = getattr(reward, "ceiling", None)
    return None if known is None else float(known([p.text for p in prompts]))


def name_of(reward: Reward) -> str:
    """What to call it."""
    return str(getattr(reward, "__name__", type(reward).__name__))


def full_name(reward: Reward) -> str:
    """What a record calls it: module:function if a module has it, as `reward_of` takes it; else its own name."""
    name = getattr(reward, "__qualname__", None)
    return name_of(reward) if name is None else name if "<" in name else f"{reward.__module__}:{name}"


def ask(reward: Reward, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """The rewards, (n,), one finite number a picture, or an error that names the reward and the picture's prompt."""
    name, n = name_of(reward), len(images)
    try:
        with torch.autocast(images.device.type, enabled=False):
            found = reward(images, [p.text for p in prompts], [p.metadata for p in prompts])
    except Exception as wrong:
        texts = f"of {prompts[0].text!r} to {prompts[-1].text!r}"
        raise RunFailed(f"reward {name} failed on {n} pictures, {texts}: {type(wrong).__name__}: {wrong}") from wrong
    found = as_tensor(found, images.device)
    if not torch.is_tensor(found) or found.shape != (n,):
        got = tuple(found.shape) if torch.is_tensor(found) else type(found).__name__
        raise ValueError(f"reward {name} must return a tensor of shape ({n},), one number a picture, got {got}")
    if not found.is_floating_point():
        raise ValueError(f"reward {name} must return floating-point numbers, got {found.dtype}")
    if found.requires_grad and not getattr(reward, "differentiable", False):
        raise ValueError(f"reward {name} has a gradient: return it detached, or say `differentiable = True`")
    if bool((bad := ~found.detach().isfinite()).any()):
        i = int(bad.nonzero()[0])
        raise NotFinite(
            f"reward {name} is {float(found[i])} for picture {i} of {n}, of {prompts[i].text!r}",
            images=images[bad], reward=found[bad],
        )  # fmt: skip
    return found


def as_tensor(answer: Any, device: torch.device) -> Any:
    """A tensor of an array or of a list (of numbers, or of tensors), also where it is the first of a pair; anything
    else is left as it is."""
    if isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[0], Tensor | np.ndarray | list):
        answer = answer[0]
    with suppress(TypeError, ValueError, RuntimeError):  # of objects, or ragged
        if isinstance(answer, np.ndarray):
            return torch.from_numpy(answer.copy()).to(device)
        if isinstance(answer, list) and answer and all(torch.is_tensor(number) for number in answer):
            return torch.stack(answer)
        if isinstance(answer, list):
            return torch.tensor(answer, dtype=torch.float32, device=device)
    return answer


class Patient:
    """A reward that is asked again when it fails, and given up after a time.

    Args:
        retries: how often it is asked again.
        timeout: seconds a call may take; it then runs in a thread of its own.
        name: what errors call it.
    """

    def __init__(self, reward: Reward, retries: int = 0, timeout: float | None = None, name: str | None = None) -> None:
        self.reward, self.retries, self.timeout = reward, retries, timeout
        self.__name__ = name or name_of(reward)

    def __getattr__(self, name: str) -> Any:  # differentiable, ceiling
        if name == "reward":  # not made yet
            raise AttributeError(name)
        return getattr(self.reward, name)

    def __call__(self, images: Tensor, prompts: list[str], metadata: Metadata) -> Tensor:
        for left in reversed(range(self.retries + 1)):
            try:
                return self.once(images, prompts, metadata)
            except Exception as wrong:
                if not left:
                    raise
                warnings.warn(f"reward {self.__name__}: {wrong}; asked again, {left} times more", stacklevel=2)
        raise AssertionError

    def once(self, images: Tensor, prompts: list[str], metadata: Metadata) -> Tensor:
        """One call, within the time."""
        if self.timeout is None:
            return self.reward(images, prompts, metadata)
        answer: Future[Tensor] = Future()
        grad = torch.is_grad_enabled()  # a thread has its own

        def work() -> None:
            try:
                if images.is_cuda:
                    torch.cuda.set_device(images.device)  # so has its device
                with torch.set_grad_enabled(grad), torch.autocast(images.device.type, enabled=False):
                    answer.set_result(self.reward(images, prompts, metadata))
            except Exception as wrong:
                answer.set_exception(wrong)

        Thread(target=work, daemon=True).start()
        try:
            return answer.result(self.timeout)
        except TimeoutError:
            if answer.done():
                raise
            if close := getattr(self.reward, "close", None):
                close()
            raise TimeoutError(f"no answer within {self.timeout:g} seconds (reward_timeout)") from None


# ------------------------------------------------------------------------------------------ of the file


def kilobytes(images: Tensor, quality: int = 95) -> Tensor:
    """Size as a JPEG, (n,), in kB of 1000 bytes (the reward of arXiv 2305.13301)."""

    def size(pixels: Any) -> float:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format="JPEG", quality=quality)
        return buffer.tell() / 1000

    pictures = (images.detach().float() * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
    with ThreadPoolExecutor() as pool:
        return torch.tensor(list(pool.map(size, pictures)), dtype=torch.float32, device=images.device)


def jpeg_compressibility(images: Tensor, prompts: list[str], metadata: Metadata) -> Tensor:
    """Minus the size, in kB."""
    return -kilobytes(images)


def jpeg_incompressibility(images: Tensor, prompts: list[str], metadata: Metadata) -> Tensor:
    """The size, in kB."""
    return kilobytes(images)


# ------------------------------------------------------------------------------------------ of picture and prompt


def clip_score(model: str | None) -> Reward:
    """Cosine in CLIP (Radford et al. 2021, arXiv 2103.00020)."""
    return ClipScore(model or "openai/clip-vit-large-patch14")


def pickscore(model: str | None) -> Reward:
    """Logit of a CLIP tuned on people's choices (Kirstain et al. 2023, arXiv 2305.01569)."""
    return ClipScore(model or "yuvalkirstain/PickScore_v1", scaled=True)


def aesthetic(model: str | None) -> Reward:
    """LAION's aesthetic predictor, of the picture alone (the reward of arXiv 2305.13301)."""
    return Aesthetic(model) if model else Aesthetic()


def hpsv2(model: str | None) -> Reward:
    """Human preference score (Wu et al. 2023, arXiv 2306.09341)."""
    return read_hps(model, "HPS_v2_compressed.pt")


def hpsv2_1(model: str | None) -> Reward:
    """The same, trained on more: its numbers are not those of hpsv2."""
    return read_hps(model, "HPS_v2.1_compressed.pt")


def image_reward(model: str | None) -> Reward:
    """Xu et al. 2023, arXiv 2304.05977; with reward_python by its own package, without a gradient."""
    try:
        return ImageReward(model) if model else ImageReward()
    except OSError as wrong:
        raise ValueError(
            f"imagereward: its model cannot be had; name a folder with ImageReward.pt, imagereward=FOLDER, or install "
            f"the package image-reward in an environment of its own and give its interpreter as reward_python ({wrong})"
        ) from wrong


def _fixed(reward: Reward) -> Callable[[str | None], Reward]:
    """A reward that has no model."""

    def make(model: str | None) -> Reward:
        if model is not None:
            raise ValueError(f"reward {getattr(reward, '__name__', reward)} has no model to be named, got {model!r}")
        return reward

    return make


NAMES: dict[str, Callable[[str | None], Reward]] = {
    "jpeg-compressibility": _fixed(jpeg_compressibility),
    "jpeg-incompressibility": _fixed(jpeg_incompressibility),
    "clip-score": clip_score,
    "pickscore": pickscore,
    "imagereward": image_reward,
    "aesthetic": aesthetic,
    "hpsv2": hpsv2,
    "hpsv2.1": hpsv2_1,
    "following": _fixed(shapes.following),
    "following-soft": _fixed(shapes.following_soft),
    "cifar10-class": LogProbability,
}


# ------------------------------------------------------------------------------------------ what a user writes


@dataclass(frozen=True)
class Weighted:
    """A sum of rewards."""

    parts: tuple[tuple[float, Reward], ...]

    @property
    def differentiable(self) -> bool:
        """Whether all of them are."""
        return all(getattr(reward, "differentiable", False) for _, reward in self.parts)

    def close(self) -> None:
        """End what runs elsewhere."""
        for _, reward in self.parts:
            if close := getattr(reward, "close", None):
                close()

    def __call__(self, images: Tensor, prompts: list[str], metadata: Metadata) -> Tensor:
        total = images.new_zeros(len(images), dtype=torch.float32)
        for weight, reward in self.parts:
            total = total + weight * as_tensor(reward(images, prompts, metadata), images.device).to(total)
        return total


def reward_of(text: str, python: str | None = None) -> Reward:
    """What the text names. python: the interpreter in which `module:function`, or imagereward, is imported, instead of
    this one."""
    parts = []
    for weight, name in terms(text):
        try:
            parts.append((weight, _one(name, python)))
        except ValueError as wrong:
            raise ValueError(f"reward {text!r}: {wrong}") from wrong
    return parts[0][1] if len(parts) == 1 and parts[0][0] == 1.0 else Weighted(tuple(parts))


def terms(text: str) -> list[tuple[float, str]]:
    """The weights and names of a sum, checked as far as that goes without a model or a module."""
    found = []
    for term in text.split(" + "):
        weight, _, name = (part.strip() for part in term.rpartition("*"))
        try:
            if ":" not in name:
                _check_name(name.partition("=")[0])
            found.append((_weight(weight or "1"), name))
        except ValueError as wrong:
            raise ValueError(f"reward {text!r}: {wrong}") from wrong
    return found


def _check_name(name: str) -> None:
    module, dot, function = name.rpartition(".")
    try:
        one_of("a name without a colon (module:function)", name, NAMES)
    except ValueError as wrong:
        hint = f"; did you mean {module}:{function}?" if dot else ""
        raise ValueError(f"{wrong}{hint}") from wrong


def names_of(text: str) -> list[str]:
    """What a sum names, without weights and models."""
    return [term.rpartition("*")[2].strip().partition("=")[0] for term in text.split(" + ")]


def built_in(text: str) -> bool:
    """Whether all that a sum names is here; anything else is a program, which runs when it is loaded."""
    return all(name in NAMES for name in names_of(text))


def _weight(text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise ValueError(f"the weight before * must be a number, got {text!r}; write differences as '+ -0.1 * name'")
    return weight


def _one(name: str, python: str | None) -> Reward:
    key, _, model = name.partition("=")
    if python is not None and (key not in NAMES or key == "imagereward"):
        made = Elsewhere(python, name)
        made.worker = made.start()  # what cannot be imported there is said now
        return made
    if key in NAMES:
        try:
            return NAMES[key](model or None)
        except OSError as wrong:
            raise ValueError(f"{name}: its model cannot be had; name a folder, {key}=FOLDER ({wrong})") from wrong
    try:
        return reward_worker.load(name)
    except (ImportError, AttributeError, TypeError) as wrong:
        raise ValueError(f"{name} cannot be imported: {wrong}") from wrong


def unmade(images: Tensor, prompts: list[str], metadata: Metadata) -> Tensor:
    """In place of a reward that is not made yet; nobody calls it."""
    raise AssertionError


LARGE = ("clip-score", "pickscore", "imagereward", "aesthetic", "hpsv2", "hpsv2.1")
"""Rewards with a large model. They have a gradient where they run here."""


def has_gradient(text: str, python: str | None = None) -> bool:
    """Whether a reward will have one. It is made for that, to see that it can be, unless it has a large model."""
    found = []
    for _, name in terms(text):
        key = name.partition("=")[0]
        if key not in LARGE:
            made = reward_of(name, python)
            found.append(bool(getattr(made, "differentiable", False)))
            if close := getattr(made, "close", None):
                close()
        else:
            found.append(python is None or key != "imagereward")
    return all(found)


def own_device() -> dict[str, str]:
    """CUDA_VISIBLE_DEVICES of a worker: of several processes each has the device that accelerate gives it, or they
    would all take the first."""
    rank, visible = os.environ.get("LOCAL_RANK"), os.environ.get("CUDA_VISIBLE_DEVICES")
    if rank is None or visible == "":
        return {}
    devices = [rank] if visible is None else visible.split(",")
    return {"CUDA_VISIBLE_DEVICES": devices[int(rank) % len(devices)]}


@dataclass
class Elsewhere:
    """A reward that runs in another interpreter, started at the first call (see `reward_worker.py`)."""

    python: str
    name: str
    worker: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def __call__(self, images: Tensor, prompts: list[str], metadata: Metadata) -> Tensor:
        worker = self.worker = self.worker or self.start()
        assert worker.stdin is not None and worker.stdout is not None
        data = images.detach().float().cpu().contiguous().numpy()
        head = {"shape": list(data.shape), "prompts": list(prompts), "metadata": list(metadata)}
        try:
            worker.stdin.write(json.dumps(head).encode() + b"\n" + data.tobytes())
            worker.stdin.flush()
            line = worker.stdout.readline()
        except BrokenPipeError:
            line = b""
        if not line:
            status = worker.wait()
            if self.worker is worker:  # or another one serves already
                self.close()
            raise RuntimeError(f"reward_python {self.python} ended with exit status {status} in {self.name}")
        answer = json.loads(line)
        if isinstance(answer, dict):
            raise RuntimeError(f"{self.name} in {self.python} failed:\n{answer['error']}")
        return torch.tensor(answer, dtype=torch.float32, device=images.device)

    def start(self) -> subprocess.Popen[bytes]:
        """The interpreter, with the reward imported."""
        script = Path(__file__).with_name("reward_worker.py")
        try:
            worker = subprocess.Popen(
                [self.python, str(script), self.name], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                env={**os.environ, **own_device()},
            )  # fmt: skip
        except OSError as wrong:
            raise ValueError(f"reward_python {self.python!r} cannot be run: {wrong}") from wrong
        assert worker.stdout is not None
        answer = json.loads(worker.stdout.readline() or '{"error": "it ended without a word"}')
        if "error" in answer:
            worker.kill()
            with suppress(OSError):
                worker.__exit__(None, None, None)
            raise ValueError(f"{self.name} cannot be had in reward_python {self.python}:\n{answer['error']}")
        return worker

    def close(self) -> None:
        """End the interpreter."""
        if self.worker is not None:
            self.worker.kill()
            with suppress(OSError):  # what it has not read is of no use now
                self.worker.__exit__(None, None, None)
            self.worker = None

    def __del__(self) -> None:
        self.close()
