"""Implementations of attention that would call nothing that is intercepted, switched for the duration of a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.utils.checkpoint
from torch import nn


@contextmanager
def attention_through_sdpa(model: nn.Module) -> Iterator[None]:
    """Make every switchable attention of `model` call `scaled_dot_product_attention` inside the block.

    timm modules built with `fused_attn=False`, Hugging Face models with any attention implementation, the
    C++ fast path of `nn.MultiheadAttention`, and reentrant checkpointing (whose forward runs without a
    graph). Each switch is put back on every exit path.
    """
    with ExitStack() as stack:
        stack.enter_context(_fused_timm(model))
        stack.enter_context(_sdpa_in_configs(model))
        stack.enter_context(_python_multi_head())
        stack.enter_context(replaced(torch.utils.checkpoint, "CheckpointFunction", _PlainCheckpoint))
        yield


@contextmanager
def _fused_timm(model: nn.Module) -> Iterator[None]:
    unfused: list[Any] = [m for m in model.modules() if getattr(m, "fused_attn", None) is False]
    try:
        for module in unfused:
            module.fused_attn = True
        yield
    finally:
        for module in unfused:
            module.fused_attn = False


@contextmanager
def _sdpa_in_configs(model: nn.Module) -> Iterator[None]:
    key = "_attn_implementation_internal"
    configs = _configs([getattr(module, "config", None) for module in model.modules()], key)
    before = [(config, vars(config)[key]) for config in configs]
    try:
        for config, _ in before:
            vars(config)[key] = "sdpa"
        yield
    finally:
        for config, implementation in before:
            vars(config)[key] = implementation


def _configs(candidates: list[Any], key: str) -> list[Any]:
    found: dict[int, Any] = {}
    while candidates:
        config = candidates.pop()
        if hasattr(config, "__dict__") and key in vars(config) and id(config) not in found:
            found[id(config)] = config
            candidates.extend(vars(config).values())
    return list(found.values())


@contextmanager
def _python_multi_head() -> Iterator[None]:
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Another value under a name of a module, class or object, inside the block."""
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


class _PlainCheckpoint:
    """Takes the place of the reentrant checkpoint function: runs the segment with its graph."""

    @staticmethod
    def apply(function: Any, preserve_rng_state: bool, *args: Any) -> Any:
        return function(*args)
