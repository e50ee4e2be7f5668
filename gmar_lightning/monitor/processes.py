"""All processes as one: the probe split between them, results joined, failures agreed on, weights whole.

Everything a probe does with several processes is here, so that its numbers cannot depend on how many there
are: process r of w takes every w-th image from the r-th on, and `joined` puts the rows back in order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from gmar_lightning.explain.errors import CutOffError, LiveIteratorError, UnsupportedModelError
from gmar_lightning.monitor.sharded import Gathering, check_weights, units_of

Result = TypeVar("Result")

# What puts sharded weights together for the probe that is being taken.
_gathering: ContextVar[Gathering | None] = ContextVar("gathering", default=None)


class ProbeError(RuntimeError):
    """A probe failed on another process; says where and why.

    Attributes:
        refused: Whether the model or the arguments are at fault, rather than the moment.
    """

    def __init__(self, message: str, refused: bool = False) -> None:
        super().__init__(message)
        self.refused = refused


def refused(error: Exception) -> bool:
    """Whether the model or the arguments are at fault, rather than the moment; the same on all processes.

    A forward that is right for its training and only in the way of a probe is none: that run goes on without.
    """
    if isinstance(error, (CutOffError, LiveIteratorError)):
        return False
    return isinstance(error, (UnsupportedModelError, ValueError)) or getattr(error, "refused", False)


def rows_of_process(count: int) -> list[int]:
    """Which of `count` images this process takes, padded so that every process has equally many.

    Equal parts keep the processes in step (a sharded model communicates in its forward) and make what they
    gather one rectangular array. `joined` drops what was padded.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if _many() else (0, 1)
    longest = -(-count // world)
    return [min(index, count - 1) for index in range(rank, longest * world, world)]


def joined(parts: Sequence[Mapping[str, np.ndarray]], count: int) -> dict[str, np.ndarray]:
    """Arrays with a row per image, from all processes, in the order of the images and without padding.

    Args:
        parts: What each process made of the rows that `rows_of_process` gave it: name to `(rows, ...)`.
        count: How many images there are.

    Returns:
        Name to `(count, ...)`.
    """
    # Process r of w has images r, r + w, ...: stacked on a second axis they alternate as they should.
    return {
        name: np.stack([part[name] for part in parts], 1).reshape(-1, *values.shape[1:])[:count]
        for name, values in parts[0].items()
    }


def on_every_process(work: Callable[[], Result]) -> list[Result]:
    """Run `work` on every process and hand everyone all results, or the same failure.

    Nobody leaves before all have reported, so a failure on one process cannot leave the others waiting: it goes on
    helping them to gather sharded weights. (A model that communicates in its own forward can still wait for a process
    that failed in it.)

    Raises:
        MemoryError: When some process ran out of memory.
        ProbeError: When some process failed elsewhere; a failure here is raised as it is.
    """
    own: Exception | None = None
    outcome: tuple[str, Any]
    try:
        outcome = ("done", work())
    except Exception as error:
        if _is_out_of_memory(error):
            # Not kept: its traceback holds the tensors that filled the memory.
            outcome = ("memory", None)
        else:
            own = error
            outcome = ("refused" if refused(error) else "failed", f"{type(error).__name__}: {error}")
    if (gathering := _gathering.get()) is not None:
        gathering.finish()
    try:
        outcomes = _from_all(outcome)
        if own is not None:
            raise own
        for rank, (kind, cause) in enumerate(outcomes):
            if kind in ("failed", "refused"):
                raise ProbeError(f"on process {rank}: {cause}", refused=kind == "refused")
        if any(kind == "memory" for kind, _ in outcomes):
            raise MemoryError
        return [result for _, result in outcomes]
    finally:
        own = None  # or the error and this frame would keep each other, and the activations, alive


def of_first_process(value: Result) -> Result:
    """What the first process has, on every process; the others' `value` is dropped."""
    if not _many():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def _from_all(outcome: tuple[str, Any]) -> list[tuple[str, Any]]:
    if not _many():
        return [outcome]
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, outcome)
    return outcomes


def _many() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _is_out_of_memory(error: Exception) -> bool:
    text = str(error).lower()
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)
    )


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Let passes of a probe run on every process by themselves: weights where they are needed, the same buffers.

    Entered once per probe, around everything the probe asks of the model; inside, passes run within
    `on_every_process`. Buffers (running statistics) drift apart between processes until the next training forward:
    those of the first process are taken. Weights that FSDP (version 1 or 2) has sharded are put together unit by
    unit, see `sharded`.

    Args:
        model: The model; every process must enter and leave together.

    Raises:
        UnsupportedModelError: When weights are cut up otherwise (tensor parallelism, DeepSpeed).
    """
    check_weights(model)
    with ExitStack() as stack:
        if dist.is_available() and dist.is_initialized():
            units = units_of(model)
            if units:
                gathering = Gathering(units)
                token = _gathering.set(gathering)
                stack.callback(_gathering.reset, token)
                stack.enter_context(gathering.open())
            stack.enter_context(_buffers_of_first(model))
        yield


@contextmanager
def _buffers_of_first(model: nn.Module) -> Iterator[None]:
    kept = [(buffer, buffer.detach().clone()) for buffer in model.buffers() if buffer.is_floating_point()]
    try:
        with torch.no_grad():
            for buffer, _ in kept:
                dist.broadcast(buffer, src=0)
        yield
    finally:
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)
