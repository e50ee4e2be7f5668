"""The one door every attention call passes: `scaled_dot_product_attention`, recorded in place."""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gmar_lightning.explain.adapters import attention_through_sdpa
from gmar_lightning.explain.errors import UnsupportedModelError
from gmar_lightning.explain.trace import ModuleTrace, in_backward

__all__ = ["AttentionCall", "Passage", "Recording", "attention_door", "record_attention", "recording"]

_FUSED = F.scaled_dot_product_attention
_SOFTMAX = frozenset({F.softmax, torch.softmax, Tensor.softmax, torch.special.softmax})


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """One attention call of a forward pass.

    Attributes:
        name: Path of the module that made the call, as in `model.named_modules()`.
        q: Queries, detached, `(batch, heads, queries, dim)`.
        k: Keys, detached, `(batch, key_heads, keys, dim)`.
        v: Values, detached, `(batch, key_heads, keys, value_dim)`.
        mask: Boolean (True attends) or additive mask that broadcasts to `(batch, heads, queries, keys)`.
        scale: Factor on `q k^T`.
        output: What the model goes on with, attached to its graph, `(batch, heads, queries, value_dim)`.
        causal: Whether a query sees only the keys up to its own position.
        depth: Calls that do not feed one another (parallel branches of a block) share a depth.
        owner: Class name of the module that made the call.
        shared_qkv: Whether queries, keys and values were one tensor (parameter-free pooling).
        twin: Whether the same invocation of a module made another call beside this one.
    """

    name: str
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    scale: float
    output: Tensor
    causal: bool = False
    depth: int = 0
    owner: str = ""
    shared_qkv: bool = False
    twin: bool = False

    def per_head(self, which: Literal["k", "v"]) -> Tensor:
        """Keys or values with one entry per query head, `(batch, heads, keys, dim)`, in at least float32."""
        tensor = getattr(self, which)
        groups = self.q.shape[1] // tensor.shape[1]
        return _at_least_float32(tensor.repeat_interleave(groups, 1) if groups > 1 else tensor)

    def attention(self, rows: slice = slice(None)) -> Tensor:
        """The softmaxed attention map of some query rows, `(batch, heads, rows, keys)`."""
        scores = (_at_least_float32(self.q[:, :, rows]) * self.scale) @ self.per_head("k").mT
        queries, keys = self.q.shape[-2], self.k.shape[-2]
        if self.causal:
            allowed = torch.ones(queries, keys, dtype=torch.bool, device=scores.device).tril()
            scores = scores.masked_fill(~allowed[rows], -math.inf)
        if self.mask is not None:
            mask = self.mask[..., rows, :] if self.mask.shape[-2] > 1 else self.mask
            scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
        return scores.softmax(-1)


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


@dataclass
class Recording:
    """What one forward pass showed: its attention calls and the trace of its modules."""

    calls: list[AttentionCall] = field(default_factory=list)
    softmaxes: list[str] = field(default_factory=list)
    trace: ModuleTrace = field(default_factory=ModuleTrace)


@contextmanager
def record_attention(model: nn.Module) -> Iterator[list[AttentionCall]]:
    """Record every attention call of the forward passes inside the block, in forward order.

    The fused kernels keep running: `scaled_dot_product_attention` is seen as it is called, by timm, Hugging
    Face, `nn.MultiheadAttention` and hand-written modules alike; implementations that would bypass it are
    switched for the duration of the block. Nothing is left behind on any exit path.

    Args:
        model: The module whose paths name the calls.

    Yields:
        The list that fills as the model runs. Keep the block open while gradients of the outputs are taken,
        so that checkpointed layers recompute as they ran.

    Example:
        >>> with record_attention(model) as calls:  # doctest: +SKIP
        ...     logits = model(images)
        ...     grads = torch.autograd.grad(logits[:, 3].sum(), [call.output for call in calls])
    """
    with recording(model) as found:
        yield found.calls


@contextmanager
def recording(model: nn.Module) -> Iterator[Recording]:
    """As `record_attention`, with the trace that `TokenLayout` needs to derive the picture."""
    found = Recording()
    previous: list[Passage] = []

    def record(passage: Passage) -> Tensor:
        feeds = bool(found.calls) and _feeds(found.calls[-1].output, (passage.q, passage.k, passage.v))
        depth = found.calls[-1].depth + feeds if found.calls else 0
        twin = bool(previous) and not feeds and previous[-1].invocation == passage.invocation
        output = passage.compute()
        if torch.is_grad_enabled() and not output.requires_grad:
            output.requires_grad_()
        found.trace.saw_attention(output)
        found.calls.append(
            AttentionCall(
                name=passage.name,
                q=passage.q.detach(),
                k=passage.k.detach(),
                v=passage.v.detach(),
                mask=None if passage.mask is None else passage.mask.detach(),
                scale=passage.scale,
                output=output,
                causal=passage.causal,
                depth=depth,
                owner=passage.owner,
                shared_qkv=passage.q is passage.k and passage.k is passage.v,
                twin=twin,
            )
        )
        previous[:] = [passage]
        return output

    with attention_door(model, record, found.trace, found.softmaxes):
        yield found


@contextmanager
def attention_door(
    model: nn.Module,
    handle: Callable[[Passage], Tensor],
    trace: ModuleTrace | None = None,
    softmaxes: list[str] | None = None,
) -> Iterator[None]:
    """Lead every attention call of `model` through `handle`, which returns the call's output.

    Args:
        model: The module whose paths name the calls.
        handle: Called once per attention call with its `Passage`.
        trace: Follows which module is running; made here when not given.
        softmaxes: Collects the names of modules that compute attention-like softmaxes by hand.
    """
    trace = ModuleTrace() if trace is None else trace
    door = _Door(handle, trace, threading.get_ident())
    watch = _Watch(door, trace, [] if softmaxes is None else softmaxes)
    with ExitStack() as stack:
        stack.enter_context(attention_through_sdpa(model))
        stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", door))
        stack.enter_context(mock.patch.object(F, "multi_head_attention_forward", door.multi_head))
        stack.enter_context(trace.following(model))
        stack.enter_context(watch)
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
        if self.inside or threading.get_ident() != self.thread:
            return _FUSED(*args, **kwargs)
        if in_backward():
            # A checkpointed layer recomputes: same kernel, same graph, nothing recorded twice.
            output = _FUSED(*args, **kwargs)
            return output if output.requires_grad or not torch.is_grad_enabled() else output.requires_grad_()
        bound = _SIGNATURE.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        query, scale = given["query"], given["scale"]
        name, owner, invocation = self.trace.current()
        self.last = Passage(
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
        self.inside = True
        try:
            return self.handle(self.last)
        finally:
            self.inside = False

    def multi_head(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """`multi_head_attention_forward`, led through the fused path also when weights are asked for."""
        bound = _MULTI_HEAD_SIGNATURE.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        wanted, given["need_weights"] = given["need_weights"], False
        output, _ = _MULTI_HEAD(*bound.args, **bound.kwargs)
        if not wanted or self.last is None:
            return output, None
        passage, self.last = self.last, None
        weights = _map_of(passage)
        weights = weights.mean(1) if given["average_attn_weights"] else weights
        return output, _SideBranch.apply(weights, output)


class _SideBranch(torch.autograd.Function):
    """Attention weights handed to the model: fine to look at, refused when the logits depend on them."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, anchor: Tensor) -> Tensor:
        return weights.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        raise UnsupportedModelError(
            "the logits depend on attention weights returned by nn.MultiheadAttention(need_weights=True), not "
            "only on its output: the gradient of the attention map cannot be read off the output alone."
        )


class _Watch(TorchFunctionMode):
    """Sees what the swapped name cannot: calls through another binding, and attention computed by hand."""

    def __init__(self, door: _Door, trace: ModuleTrace, softmaxes: list[str]) -> None:
        super().__init__()
        self.door, self.trace, self.softmaxes = door, trace, softmaxes

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _FUSED and not self.door.inside and not in_backward():
            return self.door(*args, **kwargs)
        result = func(*args, **kwargs)
        if func in _SOFTMAX and not self.door.inside and _looks_like_attention(result):
            name, owner, _ = self.trace.current()
            self.softmaxes.append(f"{name} ({owner})")
        return result


def _looks_like_attention(result: Any) -> bool:
    shape = tuple(result.shape) if isinstance(result, Tensor) else ()
    return len(shape) >= 4 or (len(shape) == 3 and shape[-1] == shape[-2])


def _map_of(passage: Passage) -> Tensor:
    with torch.no_grad():
        call = AttentionCall(
            name=passage.name,
            q=passage.q,
            k=passage.k,
            v=passage.v,
            mask=passage.mask,
            scale=passage.scale,
            output=passage.q,
            causal=passage.causal,
        )
        return call.attention().to(passage.q.dtype)


def _feeds(output: Tensor, tensors: tuple[Tensor, ...]) -> bool:
    """Whether `tensors` were computed from `output`, read off the autograd graph.

    Nodes older than the output cannot have been computed from it, which keeps the walk inside one layer.
    """
    target = torch.autograd.graph.get_gradient_edge(output).node if output.requires_grad else None
    if target is None:
        return True
    oldest = target._sequence_nr() if output.grad_fn is not None else 0
    stack = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    seen = set(stack)
    while stack:
        node = stack.pop()
        if node is target:
            return True
        for parent, _ in node.next_functions:
            if parent is not None and parent not in seen and (parent is target or _age(parent) >= oldest):
                seen.add(parent)
                stack.append(parent)
    return False


def _age(node: Any) -> int:
    # Leaves carry the largest sequence number there is, and lead nowhere.
    return node._sequence_nr() if node.next_functions else -1


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
