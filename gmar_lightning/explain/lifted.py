"""Gradients where a model's own forward cuts them off: `no_grad` around a backbone, detached features.

A linear probe on a frozen backbone runs the backbone under `torch.no_grad()` or detaches its features: right for
its training, and in the way of an explanation. For the pass of the explanation both can be lifted: the values are
the same, only the graph goes on. This is tried only after the model as it is was refused, as a model may detach
something on purpose (a temperature, a target), which its explanation must then respect.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gmar_lightning.explain.errors import UnsupportedModelError

Lifted = Literal["nothing", "no_grad", "no_grad and detach"]
Result = TypeVar("Result")

_lifted: ContextVar[Lifted] = ContextVar("lifted", default="nothing")
_DETACHING = frozenset({Tensor.detach, Tensor.detach_, torch.detach, Tensor.data.__get__})  # type: ignore[attr-defined]


def with_gradients_lifted(explain: Callable[[], Result]) -> Result:
    """Explain a model as it is, else with `no_grad` lifted in its forward, else with `detach` lifted too.

    Raises:
        UnsupportedModelError: The refusal of the model as it is, when lifting does not help.
    """
    try:
        return explain()
    except UnsupportedModelError as refusal:
        first = refusal
    for level in ("no_grad", "no_grad and detach"):
        token = _lifted.set(level)
        try:
            return explain()
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception:
            # A forward may not stand what it did not ask for (`.numpy()` of what now has a graph).
            continue
        finally:
            _lifted.reset(token)
    raise first


@contextmanager
def lifting() -> Iterator[None]:
    """Lift what `with_gradients_lifted` asks for while a classifier's forward runs."""
    level = _lifted.get()
    if level == "nothing":
        yield
        return
    # Inference mode is a guard in C++ that no function mode sees; its context manager is plain Python.
    enter = torch.inference_mode.__enter__
    torch.inference_mode.__enter__ = _enter_without_effect  # type: ignore[method-assign]
    try:
        with _Lifting(detach=level == "no_grad and detach"):
            yield
    finally:
        torch.inference_mode.__enter__ = enter  # type: ignore[method-assign]


def _enter_without_effect(context: Any) -> None:
    context._inference_mode_context = nullcontext()


class _Lifting(TorchFunctionMode):
    def __init__(self, detach: bool) -> None:
        super().__init__()
        self._detach = detach

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._C._set_grad_enabled and not args[0] and not _asked_by_us():
            return None
        if self._detach and func in _DETACHING and args[0].is_floating_point() and not _asked_by_us():
            # Another tensor over the same memory, as `detach` returns, but one that stays in the graph.
            return args[0].view_as(args[0]) if func is not Tensor.detach_ else args[0]
        return func(*args, **(kwargs or {}))


def _asked_by_us() -> bool:
    """Whether the innermost caller outside of torch is this package, which looks at tensors without a graph."""
    frame: Any = sys._getframe(2)
    while frame is not None and frame.f_globals.get("__name__", "").startswith("torch."):
        frame = frame.f_back
    return frame is not None and frame.f_globals.get("__name__", "").startswith("gmar_lightning.")
