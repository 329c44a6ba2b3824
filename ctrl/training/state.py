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
from ctrl.training.split import shared_like, whole


class Stateful(Protocol):
    """What can be written, and brought back."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any], /) -> Any: ...


class Weights:
    """What training moves of a model's state: trained weights, and buffers; whole where it is split.

    Args:
        like: the model that says which weights are trained, if another one does.
    """

    def __init__(self, model: nn.Module, like: nn.Module | None = None) -> None:
        self.model, self.like = model, model if like is None else like

    def _moving(self) -> dict[str, Tensor]:
        frozen = {name for name, p in self.like.named_parameters(remove_duplicate=False) if not p.requires_grad}
        return {name: v for name, v in self.model.state_dict().items() if name not in frozen}

    def state_dict(self) -> dict[str, Tensor]:
        return dict(whole(self._moving()))

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        now = self.model.state_dict()
        self.model.load_state_dict({name: shared_like(v, now[name]) for name, v in state.items()}, strict=False)

    def shapes(self) -> str:
        """A digest of the names, shapes and dtypes of a model's tensors, and of which of them are written."""
        moving, state = self._moving(), self.model.state_dict()
        text = json.dumps([(name, list(v.shape), str(v.dtype), name in moving) for name, v in state.items()])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class OptimizerState:
    """An optimiser's, whole where its model is split."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        return dict(whole(self.optimizer.state_dict()))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        held = {
            i: {name: shared_like(v, parameters[i]) if _fits(v, parameters[i]) else v for name, v in moments.items()}
            for i, moments in state["state"].items()
        }
        self.optimizer.load_state_dict({**state, "state": held})


def _fits(v: Any, parameter: Tensor) -> bool:
    """Whether it has a number for each of the parameter's, as moments do."""
    return torch.is_tensor(v) and v.shape == parameter.shape


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
    return digest(whole({name: p for name, p in model.named_parameters() if not p.requires_grad}))


def identity(model: Any) -> str:
    """A digest of what a model holds and is not trained, wherever it lies; of anything else, its type."""
    if not isinstance(model, nn.Module):
        return type(model).__name__
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    offloaded = any(has_offloaded_params(module) for module in model.modules())
    held = get_state_dict_offloaded_model(model) if offloaded else model.state_dict()
    return digest(whole({name: v for name, v in held.items() if name not in trained}))
