"""Everything a probe must not leave behind: one context manager, one place."""

from __future__ import annotations

import random
import warnings
import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from gmar_lightning.explain.iterators import Guard
from gmar_lightning.explain.reach import Snapshot

# Which weights the forward of a model was seen to write, by path; a model that is not here was not watched yet.
_WRITTEN: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()
# The trace of the block around this one, which holds more than the model: weights need no second copy then.
_around: ContextVar[Trace | None] = ContextVar("around", default=None)


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Run a probe on a live module and hand the module and the process back as they were found.

    Inside, `module` is in evaluation mode, gradients are enabled (even when called under `no_grad` or
    `inference_mode`), compiled code runs eagerly without being recompiled, and autocast keeps its dtype but
    caches nothing. On every exit path, exceptions and KeyboardInterrupt included, these are as before: the
    random states of torch, CUDA, NumPy and Python, the grad mode, the compile stance, and all state that can be
    reached from the module (see `kept`).

    Weights are copied at the first call for a module only; afterwards those are copied which were written then,
    and of the others the write counter is watched.

    Args:
        module: The module about to be run; its parameters and their `.grad` are never written.
    """
    written = _WRITTEN.get(module)
    every = written is None and _around.get() is None
    with ExitStack() as stack:
        stack.enter_context(isolated_random_state())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(_uncached_autocast())
        trace = stack.enter_context(
            kept({type(module).__name__: module}, None if every else written or set())
        )
        stack.enter_context(_evaluation_mode(module))
        yield
    if _around.get() is None:
        _WRITTEN.setdefault(module, set()).update(trace.changed)
        lost = [path for path in trace.left if path not in trace.watched]
        for paths, then in ((trace.watched, "; it is kept from here on"), (lost, "")):
            if paths:
                warnings.warn(
                    f"the forward pass of {type(module).__name__} wrote {listed(paths)}, which was not kept and "
                    f"could not be put back{then}",
                    stacklevel=4,
                )


@dataclass
class Trace:
    """What a probe changed; filled in when its block ends.

    Attributes:
        changed: Paths of what was no longer as it was.
        left: Those among them that could not be put back.
        watched: Those of `left` that were only watched, as the caller asked for.
        live: Paths of live iterators that were drawn from, so that the block was stopped before it changed them.
        at_risk: Paths of what could not be put back if it changed; known when the block begins.
        truncated: Whether there was more state than the walk covers.
    """

    changed: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    watched: list[str] = field(default_factory=list)
    live: list[str] = field(default_factory=list)
    at_risk: list[str] = field(default_factory=list)
    truncated: bool = False


@contextmanager
def kept(
    roots: Mapping[str, Any],
    weights: set[str] | None = None,
    skip: tuple[Any, ...] = (),
    rehearse: bool = False,
) -> Iterator[Trace]:
    """Put back whatever changed inside the block of the state that can be reached from some objects.

    That is: tensors, their memory, shape, `requires_grad` and `.grad`; attributes, slots, lists, dictionaries,
    sets and deques, nested; NumPy arrays; random generators; open files' positions; hooks and what they enclose;
    and for the code that a forward runs, class attributes, closures and module globals. A live generator that the
    code draws from cannot be put back, so drawing from it raises `LiveIteratorError`.

    Args:
        roots: Name to object.
        weights: Paths of the weights that are copied; None copies all. Of others the write counter is watched.
        skip: Objects that are not entered.
        rehearse: Whether to find out beforehand what could not be put back.

    Yields:
        The trace, complete when the block has ended.
    """
    snapshot = Snapshot(
        roots, keep=(lambda where: True) if weights is None else weights.__contains__, skip=skip
    )
    trace = Trace(truncated=snapshot.truncated)
    token = _around.set(trace)
    guards: list[Guard] = []
    try:
        trace.at_risk = snapshot.at_risk() if rehearse else []
        guards = snapshot.guard()
        yield trace
    finally:
        _around.reset(token)
        changed, trace.left, trace.watched = snapshot.restore()
        trace.live += [guard.where for guard in guards if guard.asked]
        trace.changed = list(dict.fromkeys([*trace.changed, *changed]))
        if (around := _around.get()) is not None:
            # The block around this one does not see any more what was put back here.
            around.changed += [path for path in trace.changed if path not in trace.left]


def listed(paths: list[str]) -> str:
    """The first paths as a sentence says them, and how many more there are."""
    return ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")


@contextmanager
def isolated_random_state(seed: int | None = None) -> Iterator[None]:
    """Restore the random states of torch, CUDA, NumPy and Python afterwards, whatever was drawn.

    Args:
        seed: Seed all of them with this number inside; None leaves them where they are.
    """
    # Asking CUDA for its state would initialise it, which no diagnostic should do on its own.
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    cpu, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        if seed is not None:
            # torch.manual_seed would also note a seed for a CUDA that is yet to be initialised.
            torch.default_generator.manual_seed(seed)
            if cuda is not None:
                torch.cuda.manual_seed_all(seed)
            np.random.seed(seed)
            random.seed(seed)
        yield
    finally:
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        np.random.set_state(numpy_state)
        random.setstate(python_state)


@contextmanager
def _evaluation_mode(module: nn.Module) -> Iterator[None]:
    # The flag is set directly: .eval() and .train() may be overridden (frozen norms, merged adapters),
    # and a blanket .train() afterwards would thaw what the user froze.
    flags = [(submodule, submodule.training) for submodule in module.modules()]
    try:
        for submodule, _ in flags:
            submodule.training = False
        yield
    finally:
        for submodule, training in flags:
            submodule.training = training


@contextmanager
def _uncached_autocast() -> Iterator[None]:
    # A cached low-precision weight would carry the probe's graph into the training step that follows.
    with ExitStack() as stack:
        for device_type in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device_type):
                dtype = torch.get_autocast_dtype(device_type)
                stack.enter_context(torch.autocast(device_type, dtype=dtype, cache_enabled=False))
        yield
