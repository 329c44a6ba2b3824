"""What of a run has a state: weights, optimisers, random numbers. Each has `state_dict` and `load_state_dict`."""

from __future__ import annotations

import hashlib
import json
import random
from typing import Any, Protocol

import numpy as np
import torch
from accelerate.utils import has_offloaded_params
from accelerate.utils.modeling import get_state_dict_offloaded_model
from torch import Tensor, nn

from ctrl.training.files import digest


class Stateful(Protocol):
    """What can be written, and brought back."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any], /) -> Any: ...


class Weights:
    """What training moves of a model's state: trained weights, and buffers.

    Args:
        like: the model that says which weights are trained, if another one does.
    """

    def __init__(self, model: nn.Module, like: nn.Module | None = None) -> None:
        self.model, self.like = model, model if like is None else like

    def state_dict(self) -> dict[str, Tensor]:
        frozen = {name for name, p in self.like.named_parameters(remove_duplicate=False) if not p.requires_grad}
        return {name: v for name, v in self.model.state_dict().items() if name not in frozen}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.model.load_state_dict(state, strict=False)

    def shapes(self) -> str:
        """A digest of the names, shapes and dtypes of a model's tensors, and of which of them are written."""
        moving, state = self.state_dict(), self.model.state_dict()
        text = json.dumps([(name, list(v.shape), str(v.dtype), name in moving) for name, v in state.items()])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class RandomState:
    """Of Python, NumPy and PyTorch, for policies and rewards that draw for themselves."""

    def state_dict(self) -> dict[str, Any]:
        name, keys, *rest = np.random.get_state()  # noqa: NPY002
        numpy = [name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest]
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        return {"python": random.getstate(), "numpy": numpy, "torch": torch.get_rng_state(), "cuda": cuda}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        name, keys, *rest = state["numpy"]
        random.setstate(state["python"])
        np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
        torch.set_rng_state(state["torch"])
        if len(state["cuda"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0):
            torch.cuda.set_rng_state_all(state["cuda"])


def frozen_digest(model: nn.Module) -> str:
    """Of the weights of a trained model that are not trained."""
    return digest({name: p for name, p in model.named_parameters() if not p.requires_grad})


def identity(model: Any) -> str:
    """A digest of what a model holds and is not trained, wherever it lies; of anything else, its type."""
    if not isinstance(model, nn.Module):
        return type(model).__name__
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    offloaded = any(has_offloaded_params(module) for module in model.modules())
    held = get_state_dict_offloaded_model(model) if offloaded else model.state_dict()
    return digest({name: v for name, v in held.items() if name not in trained})
