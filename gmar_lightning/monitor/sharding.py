"""One model on all processes while a probe runs: sharded weights whole, buffers alike."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Hold the same, whole model on every process: sharded weights put together, buffers of the first process.

    Buffers (running statistics) drift apart between processes until the next training forward. And a probe
    runs backward several times over parts of one graph, which sharding's own gathering, made for one backward
    per forward, does not foresee. As no forward communicates inside, a process that fails in one leaves nobody
    waiting. Costs the memory of the unsharded weights under FSDP (version 1 or 2).

    Args:
        model: The model; every process must enter and leave together.
    """
    with ExitStack() as stack:
        if dist.is_available() and dist.is_initialized():
            from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

            wrappers = [part for part in model.modules() if isinstance(part, FullyShardedDataParallel)]
            if wrappers:
                stack.enter_context(FullyShardedDataParallel.summon_full_params(model, writeback=False))
                stack.enter_context(_unwrapped(wrappers))
            sharded = [part for part in model.modules() if isinstance(part, FSDPModule)]
            if sharded:
                stack.enter_context(_unsharded(sharded))
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


@contextmanager
def _unwrapped(wrappers: list[Any]) -> Iterator[None]:
    try:
        for wrapper in wrappers:
            vars(wrapper)["forward"] = wrapper.module.__call__
        yield
    finally:
        for wrapper in wrappers:
            vars(wrapper).pop("forward", None)


@contextmanager
def _unsharded(modules: list[Any]) -> Iterator[None]:
    states = [module._get_fsdp_state() for module in modules]
    for state in states:
        state._lazy_init()  # or the first forward would do it in the middle, on settings that are not the user's
    groups = [group for state in states for group in _groups(state)]
    kept = [(group, group.post_forward_mesh_info, group.reshard_after_backward) for group in groups]
    try:
        for module in modules:
            module.unshard()
        for group in groups:
            group.post_forward_mesh_info, group.reshard_after_backward = None, False
        yield
    finally:
        for group, mesh, reshard in kept:
            group.post_forward_mesh_info, group.reshard_after_backward = mesh, reshard
        for module in modules:
            module.reshard()


def _groups(state: Any) -> list[Any]:
    several = getattr(state, "_fsdp_param_groups", None)  # newer torch; older has one
    return list(several) if several is not None else [g for g in (state._fsdp_param_group,) if g is not None]
