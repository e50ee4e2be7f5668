"""The one door every attention call passes: `scaled_dot_product_attention`, seen by name and by mode."""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gmar_lightning.explain.adapters import attention_through_sdpa
from gmar_lightning.explain.errors import UnsupportedModelError
from gmar_lightning.explain.trace import ModuleTrace, in_backward

__all__ = ["USES_WEIGHTS", "Passage", "attention_door", "softmax_map"]

_FUSED = F.scaled_dot_product_attention
_SOFTMAX = frozenset({F.softmax, torch.softmax, Tensor.softmax, torch.special.softmax})

USES_WEIGHTS = (
    "the logits depend on attention weights returned by nn.MultiheadAttention(need_weights=True), not only on its "
    "output: the gradient of the attention map cannot be read off the output alone."
)


@dataclass(frozen=True, eq=False)
class Passage:
    """An attention call on its way through the door, before it is computed."""

    name: str
    owner: str
    invocation: int
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    causal: bool
    scale: float
    grouped: bool

    def compute(self, mask: Tensor | None = None) -> Tensor:
        """Run the fused kernel, with another mask if one is given (the causal flag is then part of it)."""
        causal = self.causal and mask is None
        mask = self.mask if mask is None else mask
        extra: dict[str, Any] = {"enable_gqa": True} if self.grouped else {}
        return _FUSED(self.q, self.k, self.v, attn_mask=mask, is_causal=causal, scale=self.scale, **extra)


def softmax_map(
    q: Tensor, k: Tensor, mask: Tensor | None, scale: float, causal: bool, rows: slice = slice(None)
) -> Tensor:
    """The softmaxed attention map of some query rows, `(batch, heads, rows, keys)`, in at least float32."""
    key = at_least_float32(one_per_head(k, q.shape[1]))
    scores = (at_least_float32(q[:, :, rows]) * scale) @ key.mT
    if causal:
        allowed = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~allowed[rows], -math.inf)
    if mask is not None:
        part = mask[..., rows, :] if mask.ndim > 1 and mask.shape[-2] > 1 else mask
        scores = scores.masked_fill(~part, -math.inf) if part.dtype == torch.bool else scores + part
    return scores.softmax(-1)


def one_per_head(tensor: Tensor, heads: int) -> Tensor:
    """Keys or values of grouped heads, repeated to one entry per query head."""
    groups = heads // tensor.shape[1]
    return tensor.repeat_interleave(groups, 1) if groups > 1 else tensor


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision raised to float32, in which everything is reduced; float64 stays."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


@contextmanager
def attention_door(
    model: nn.Module,
    handle: Callable[[Passage], Tensor],
    trace: ModuleTrace | None = None,
) -> Iterator[None]:
    """Lead every attention call of `model` through `handle`, which returns the call's output.

    Args:
        model: The module whose paths name the calls.
        handle: Called once per attention call with its `Passage`.
        trace: Follows what runs; made here when not given.
    """
    trace = ModuleTrace() if trace is None else trace
    door = _Door(handle, trace, threading.get_ident())
    with ExitStack() as stack:
        stack.enter_context(attention_through_sdpa(model))
        stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", door))
        stack.enter_context(mock.patch.object(F, "multi_head_attention_forward", door.multi_head))
        stack.enter_context(trace.following(model))
        stack.enter_context(_Watch(door, trace))
        yield


_SIGNATURE = inspect.Signature(
    [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default)
        for name, default in (
            ("query", inspect.Parameter.empty),
            ("key", inspect.Parameter.empty),
            ("value", inspect.Parameter.empty),
            ("attn_mask", None),
            ("dropout_p", 0.0),
            ("is_causal", False),
            ("scale", None),
            ("enable_gqa", False),
        )
    ]
)
_MULTI_HEAD = F.multi_head_attention_forward
_MULTI_HEAD_SIGNATURE = inspect.signature(_MULTI_HEAD)


class _Door:
    """Stands in for `scaled_dot_product_attention` while a block is open."""

    def __init__(self, handle: Callable[[Passage], Tensor], trace: ModuleTrace, thread: int) -> None:
        self.handle, self.trace, self.thread = handle, trace, thread
        self.inside = False
        self.last: Passage | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        recomputing = in_backward()
        if self.inside or (threading.get_ident() != self.thread and not recomputing):
            return _FUSED(*args, **kwargs)
        self.last = self._passage(*args, **kwargs)
        if recomputing:
            # A checkpointed layer recomputes: same kernel, same graph, nothing recorded twice.
            output = self.last.compute()
            return output if output.requires_grad or not torch.is_grad_enabled() else output.requires_grad_()
        with self._unwatched():
            return self.handle(self.last)

    @contextmanager
    def _unwatched(self) -> Iterator[None]:
        before, self.inside = self.inside, True
        try:
            yield
        finally:
            self.inside = before

    def _passage(self, *args: Any, **kwargs: Any) -> Passage:
        bound = _SIGNATURE.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        query, scale = given["query"], given["scale"]
        name, owner, invocation = self.trace.current()
        return Passage(
            name=name,
            owner=owner,
            invocation=invocation,
            q=query,
            k=given["key"],
            v=given["value"],
            mask=given["attn_mask"],
            causal=given["is_causal"],
            scale=query.shape[-1] ** -0.5 if scale is None else scale,
            grouped=given["enable_gqa"],
        )

    def multi_head(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """`multi_head_attention_forward`, led through the fused path also when weights are asked for."""
        bound = _MULTI_HEAD_SIGNATURE.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        wanted, given["need_weights"] = given["need_weights"], False
        batched = given["query"].ndim == 3
        output, _ = _MULTI_HEAD(*bound.args, **bound.kwargs)
        if not wanted or self.last is None:
            return output, None
        passage, self.last = self.last, None
        with torch.no_grad(), self._unwatched():
            weights = softmax_map(passage.q, passage.k, passage.mask, passage.scale, passage.causal)
            weights = weights.mean(1) if given["average_attn_weights"] else weights
            weights = weights.to(passage.q.dtype)
        handed = _SideBranch.apply(weights if batched else weights[0], output)
        self.trace.handed_out.add(handed.grad_fn)
        return output, handed


class _SideBranch(torch.autograd.Function):
    """Attention weights handed to the model: fine to look at, a way past the output if the logits use them."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, anchor: Tensor) -> Tensor:
        return weights.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        raise UnsupportedModelError(USES_WEIGHTS)


class _Watch(TorchFunctionMode):
    """Sees what the swapped name cannot: other bindings of the kernel, and mixing of tokens by hand."""

    def __init__(self, door: _Door, trace: ModuleTrace) -> None:
        super().__init__()
        self.door, self.trace = door, trace

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _FUSED and not self.door.inside:
            return self.door(*args, **kwargs)
        result = func(*args, **kwargs)
        if not self.door.inside:
            self.trace.saw_function(func, (*args, *kwargs.values()), result, func in _SOFTMAX)
        return result
