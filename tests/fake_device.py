"""A fake accelerator: its tensors hold CPU data, report `DEVICE`, and refuse CPU tensors beside them, as CUDA does.

    pytest -p tests.fake_device tests/on_fake_device.py

As a plugin it makes accelerate's default device this one, so that `fit` and the commands of `scale` run there. Every
operator unwraps its tensors, runs on the CPU and wraps the results. What CUDA allows beside its own tensors is allowed:
numbers of no dimension from the CPU in pointwise operators, and indices from the CPU; all else is refused.

It sees whenever the host waits for the device: a number that is read, an operator whose output's shape depends on data,
a copy from or to the host that may block. `host_syncs` counts these by the function of ours that caused them.

To register a device is for the whole process, so tests on it run in one of their own.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from torch.utils import backend_registration as registration

NAME = "fake"
ROOT = Path(__file__).parents[1]
OURS = tuple(str(ROOT / layer) for layer in ("ctrl", "toy", "scale"))
aten = torch.ops.aten

_LOWER = (
    "linear", "conv1d", "conv2d", "matmul", "mm", "bmm", "addmm", "baddbmm", "scaled_dot_product_attention",
)  # fmt: skip
"""Operators that autocast runs in half precision; the others take what they are given."""
_COPIES = {"copy_", "_to_copy", "_copy_from"}
_INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
_NUMBERS = _INDEXED | {"fill", "fill_", "masked_fill", "masked_fill_"}  # no pointwise operators, and take them as well
_READ = {
    "_local_scalar_dense", "equal", "nonzero", "masked_select", "repeat_interleave", "_unique2", "unique_dim",
    "unique_consecutive", "bincount", "_linalg_check_errors",
}  # fmt: skip


class FakeTensor(torch.Tensor):
    """A tensor on `DEVICE`, of the numbers in `raw`."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    raw: torch.Tensor

    @staticmethod
    def __new__(cls, raw: torch.Tensor) -> FakeTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls, raw.size(), strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype, device=DEVICE
        )
        made.raw = raw
        return made

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(op, args, kwargs or {})

    def __repr__(self) -> str:
        return f"{self.raw!r} on {DEVICE}"

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def untyped_storage(self) -> Any:
        return self.raw.untyped_storage()

    def data_ptr(self) -> int:
        return self.raw.data_ptr()

    def __deepcopy__(self, memo: dict[int, Any]) -> FakeTensor:
        if id(self) not in memo:
            copy = self.detach().clone().requires_grad_(self.requires_grad)
            copy.__dict__.update({name: v for name, v in self.__dict__.items() if name != "raw"})
            memo[id(self)] = copy
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        made = self.detach().cpu(), self.dtype, str(self.device), self.requires_grad
        return torch._utils._rebuild_device_tensor_from_cpu_tensor, made


def run(op: Any, args: Any, kwargs: Any) -> Any:
    """The operator on the CPU, if CUDA would have it so."""
    given = list(_tensors((*args, *kwargs.values())))
    _refuse(op, args, given)
    _notice(op, args, kwargs)
    own = {id(v.raw): v for v in given if isinstance(v, FakeTensor)}
    options = {name: v for name, v in kwargs.items() if name != "pin_memory"}
    out = op(*_each(_unwrap, args), **{name: _each(_unwrap, v) for name, v in options.items()})
    if options.get("device") is not None and options["device"].type == "cpu":
        return out
    return _each(lambda v: own[id(v)] if id(v) in own else _wrap(v), out)


def _wrap(v: Any) -> Any:
    return FakeTensor(v) if isinstance(v, torch.Tensor) else v


def _unwrap(v: Any) -> Any:
    if isinstance(v, torch.device):
        return torch.device("cpu")
    return v.raw if isinstance(v, FakeTensor) else v


def _each(f: Any, v: Any) -> Any:
    """f of v, or of every part of what is a list or tuple."""
    return type(v)(_each(f, part) for part in v) if isinstance(v, list | tuple) else f(v)


def _tensors(v: Any) -> Iterator[torch.Tensor]:
    if isinstance(v, torch.Tensor):
        yield v
    elif isinstance(v, list | tuple):
        for part in v:
            yield from _tensors(part)


def _name(op: Any) -> str:
    return op._schema.name.partition("::")[2]


def _refuse(op: Any, args: Any, tensors: list[torch.Tensor]) -> None:
    """Raise where CUDA would: tensors of the host beside those of the device."""
    name = _name(op)
    hosts = [v for v in tensors if not isinstance(v, FakeTensor)]
    if not hosts or len(hosts) == len(tensors) or name in _COPIES:
        return
    if name in _INDEXED and isinstance(args[0], FakeTensor):
        hosts = [v for v in hosts if not any(v is index for index in args[1])]
    numbers = torch.Tag.pointwise in op.tags or name in _NUMBERS
    written = [v for v, a in zip(args, op._schema.arguments, strict=False) if a.alias_info and a.alias_info.is_write]
    if any(v.ndim or not numbers or any(v is w for w in written) for v in hosts):
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but {op} got some on {DEVICE} and one on the CPU, of "
            f"shape {tuple(hosts[0].shape)}"
        )


# when the host waits


_counted: list[Counter[str]] = []


@contextmanager
def host_syncs() -> Iterator[Counter[str]]:
    """How often the host waited for the device, by the function that made it, such as
    "ctrl/training/engine.py Engine.step: read"."""
    _counted.append(Counter())
    try:
        yield _counted[-1]
    finally:
        _counted.pop()


def _notice(op: Any, args: Any, kwargs: Any) -> None:
    if not _counted or (kind := _wait(op, args, kwargs)) is None:
        return
    site = _site()
    for counter in _counted:
        counter[f"{site}: {kind}"] += 1


def _wait(op: Any, args: Any, kwargs: Any) -> str | None:
    """How the host waits in an operator of the device, if it does."""
    name = _name(op)
    if name in _READ:
        return "read"
    if name in _COPIES:
        there = kwargs["device"].type if kwargs.get("device") else args[0].device.type
        here = args[0].device.type if name == "_to_copy" else args[1].device.type
        if name == "_copy_from":
            here, there = args[0].device.type, args[1].device.type
        quiet = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
        return None if here == there or (quiet and there != "cpu") else f"{'to' if there == 'cpu' else 'from'} the host"
    if name in _INDEXED:
        indices = [v for v in args[1] if v is not None]
        if any(v.dtype in (torch.bool, torch.uint8) for v in indices):
            return "read"
        if any(not isinstance(v, FakeTensor) for v in indices):
            return "from the host"
    return None


def _site() -> str:
    """The innermost function of ours that is running."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(OURS):
            return f"{Path(code.co_filename).relative_to(ROOT)} {code.co_qualname}"
        frame = frame.f_back
    return "elsewhere"


# the device itself


class _Module(registration._DummyBackendModule):
    """torch.fake."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


def _copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    _notice(aten._copy_from.default, (source, target, non_blocking), {})
    _unwrap(target).copy_(_unwrap(source))
    return target


_KERNELS = ("CompositeExplicitAutograd", "CPU")


def _operators() -> Iterator[Any]:
    """Those of PyTorch that make a tensor on a device from none."""
    for full in torch._C._dispatch_get_all_op_names():
        space, _, name = full.partition("::")
        name, _, overload = name.partition(".")
        if space != "aten" or not hasattr(getattr(aten, name, None), overload or "default"):
            continue
        op = getattr(getattr(aten, name), overload or "default")
        kinds = {a.name: str(a.type) for a in op._schema.arguments}
        kernel = any(torch._C._dispatch_has_kernel_for_dispatch_key(full, k) for k in _KERNELS)
        if kernel and "device" in kinds and not any("Tensor" in kind for kind in kinds.values()):
            yield op


def _lower(op: Any) -> Any:
    """An operator as autocast runs it."""
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def cast(v: Any) -> Any:
        floating = isinstance(v, FakeTensor) and v.is_floating_point()
        return v.to(torch.get_autocast_dtype(NAME)) if floating else v

    def kernel(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(key):
            return op(*_each(cast, args), **{name: cast(v) for name, v in kwargs.items()})

    return kernel


def _swap_if_moved(swap: Any) -> Any:
    """Parameters that are where they should be are left alone, even while a graph holds them."""

    def swap_tensors(a: torch.Tensor, b: torch.Tensor) -> None:
        if not (a.device == b.device == DEVICE and a.data_ptr() == b.data_ptr()):
            swap(a, b)

    return swap_tensors


def register() -> list[Any]:
    """Make `DEVICE` known to PyTorch; it is there as long as what this returns."""
    hook, guard = registration._DummyPrivateUse1Hook(), registration._DummyDeviceGuard()
    registration._setup_privateuseone_for_python_backend(NAME, _Module(), hook, guard)
    torch.__future__.set_swap_module_params_on_conversion(True)  # parameters stay the same objects, as on CUDA
    torch.utils.swap_tensors = _swap_if_moved(torch.utils.swap_tensors)
    aten_, every = torch.library.Library("aten", "IMPL"), torch.library.Library("_", "IMPL")
    for op in _operators():
        aten_.impl(op, lambda *args, op=op, **kwargs: run(op, args, kwargs), "PrivateUse1")
    aten_.impl("_copy_from", _copy_from, "PrivateUse1")
    for name in _LOWER:
        aten_.impl(name, _lower(getattr(aten, name).default), "AutocastPrivateUse1")
    every.fallback(lambda op, *args, **kwargs: run(op, args, kwargs), "PrivateUse1")
    every.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    return [hook, guard, aten_, every]


_REGISTERED = register()
DEVICE = torch.device(NAME, 0)
PartialState.default_device = DEVICE  # for fixtures of a module too
os.environ.pop("ACCELERATE_USE_CPU", None)


@pytest.fixture(autouse=True)
def _accelerate_takes_it() -> Iterator[None]:
    """As it takes CUDA where there is some."""
    AcceleratorState._reset_state(reset_partial_state=True)
    with torch.autograd.set_multithreading_enabled(False):  # the stack shows who went backward
        yield
    AcceleratorState._reset_state(reset_partial_state=True)
