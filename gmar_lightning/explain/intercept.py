"""Reaching every attention call of a forward pass, whoever makes it.

All attention is led through `scaled_dot_product_attention`, and that function is intercepted in two ways at once,
because each alone is blind somewhere. Replacing the *name* in `torch.nn.functional` reaches what
`nn.MultiheadAttention` calls inside `multi_head_attention_forward` (a function mode is popped while it runs) and
what a checkpointed layer recomputes during the backward pass (where no mode is active). The function *mode*
reaches modules that imported the function under a name of their own, and shows every other function on the way.
Implementations that would call neither are switched for the duration of the block.
"""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gmar_lightning.explain.errors import UnsupportedModelError
from gmar_lightning.explain.softmax import HandProduct
from gmar_lightning.explain.switches import attention_through_sdpa, replaced
from gmar_lightning.explain.trace import ATTRIBUTES, ModuleTrace, in_backward

# The kernel itself, taken once at import: inside a block the name in `F` means the interceptor.
_FUSED = F.scaled_dot_product_attention
_SOFTMAX = frozenset({F.softmax, torch.softmax, Tensor.softmax, torch.special.softmax})

USES_WEIGHTS = (
    "the logits depend on attention weights returned by nn.MultiheadAttention(need_weights=True), not only on its "
    "output: the gradient of the attention map cannot be read off the output alone."
)


@dataclass(frozen=True, eq=False)
class CallArguments:
    """What an attention function was called with, before anything is computed.

    For attention `written` by hand, queries and keys stand for their sizes alone, `(..., queries, 1)` and
    `(..., keys, 1)`.
    """

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
    written: HandProduct | None = None

    @property
    def reads(self) -> tuple[Tensor, ...]:
        """The attached tensors that the output is computed from."""
        if self.written is not None:
            return self.written.weights, self.written.values
        return self.q, self.k, self.v

    def compute(self, mask: Tensor | None = None) -> Tensor:
        """Run the fused kernel, with another mask if one is given (the causal flag is then part of it)."""
        if self.written is not None:
            if mask is not None:
                raise UnsupportedModelError(
                    f"{self.name} ({self.owner}) computes its attention by hand: tokens cannot be hidden from it. "
                    "Take a pixel baseline."
                )
            return self.written.compute()
        causal = self.causal and mask is None
        mask = self.mask if mask is None else mask
        extra: dict[str, Any] = {"enable_gqa": True} if self.grouped else {}
        return _FUSED(self.q, self.k, self.v, attn_mask=mask, is_causal=causal, scale=self.scale, **extra)


def _computed(given: CallArguments) -> Tensor:
    output = given.compute()
    # A frozen model's recomputation must save as many tensors as its first pass did, where the output was
    # made to require a gradient; checkpointing counts them.
    return output if output.requires_grad or not torch.is_grad_enabled() else output.requires_grad_()


def with_four_axes(
    given: CallArguments, batch: int | None, heads_first: bool = False
) -> tuple[CallArguments, Callable[[Tensor], Tensor]]:
    """The call as `(batch, heads, tokens, dim)`, and what gives its output the shape that was asked for.

    `(batch, tokens, dim)` is one head, `(batch * heads, tokens, dim)` merged heads, `(heads * batch, tokens, dim)`
    the same with `heads_first`, `(batch, groups, heads, tokens, dim)` grouped ones. That merged heads belong to their
    image is settled where images are told apart.
    """
    shape, axes = given.q.shape, given.q.ndim
    if (
        batch is None
        or axes == 4
        or axes not in (3, 5)
        or (shape[0] % batch if axes == 3 else shape[0] != batch)
    ):
        return given, lambda output: output

    def apart(part: Tensor) -> Tensor:
        if heads_first:
            return part.unflatten(0, (-1, batch)).transpose(0, 1)
        return part.reshape(batch, -1, *part.shape[-2:])

    def together(output: Tensor) -> Tensor:
        output = output.transpose(0, 1) if heads_first else output
        return output.reshape(*shape[:-1], output.shape[-1])

    def reshaped(part: Tensor) -> Tensor:
        return apart(part.expand(*shape[:-2], *part.shape[-2:]))

    mask = given.mask
    if mask is not None and mask.ndim > 2:
        mask = reshaped(mask)
    q, k, v = (reshaped(part) for part in (given.q, given.k, given.v))
    if given.q is given.k and given.k is given.v:
        k = v = q
    written = given.written
    if written is not None:
        written = replace(written, compute=_after(written.compute, apart))
    return (
        replace(given, q=q, k=k, v=v, mask=mask, written=written),
        together,
    )


def _after(compute: Callable[[], Tensor], view: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
    return lambda: view(compute())


def softmax_map(
    q: Tensor, k: Tensor, mask: Tensor | None, scale: float, causal: bool, rows: slice = slice(None)
) -> Tensor:
    """The softmaxed attention map of some query rows, `(batch, heads, rows, keys)`, in at least float32."""
    return masked_scores(q, k, mask, scale, causal, rows).softmax(-1)


def masked_scores(
    q: Tensor, k: Tensor, mask: Tensor | None, scale: float, causal: bool, rows: slice = slice(None)
) -> Tensor:
    """What the softmax is taken of: `scale * q k^T`, -inf or the additive mask where masked."""
    # Scores are formed in float32 from half precision inputs: the softmax of a rounded score is off by per
    # cents.
    key = at_least_float32(one_per_head(k, q.shape[1]))
    scores = (at_least_float32(q[:, :, rows]) * scale) @ key.mT
    if causal:
        # As the kernel's `is_causal`: counted from the top left, also when there are more keys than
        # queries.
        asked = torch.arange(q.shape[-2], device=q.device)[rows]
        scores = scores.masked_fill(asked[:, None] < torch.arange(k.shape[-2], device=q.device), -math.inf)
    if mask is not None:
        part = mask[..., rows, :] if mask.ndim > 1 and mask.shape[-2] > 1 else mask
        scores = scores.masked_fill(~part, -math.inf) if part.dtype == torch.bool else scores + part
    return scores


def one_per_head(tensor: Tensor, heads: int) -> Tensor:
    """Keys or values of grouped heads, repeated to one entry per query head."""
    groups = heads // tensor.shape[1]
    return tensor.repeat_interleave(groups, 1) if groups > 1 else tensor


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision raised to float32, in which everything is reduced; float64 stays."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


@contextmanager
def intercept_attention(
    model: nn.Module,
    handle: Callable[[CallArguments], Tensor],
    trace: ModuleTrace | None = None,
    again: Callable[[CallArguments], Tensor] | None = None,
) -> Iterator[None]:
    """Lead every attention call of `model` through `handle`, which returns the call's output.

    Args:
        model: The module whose paths name the calls.
        handle: Called once per attention call with its `CallArguments`.
        trace: Follows what runs; made here when not given.
        again: Computes a call anew for a checkpointed layer in the backward pass, saving for the graph as many
            tensors as `handle` did; the fused kernel when None.
    """
    trace = ModuleTrace() if trace is None else trace
    interceptor = _Interceptor(handle, trace, threading.get_ident(), again or _computed)
    with ExitStack() as stack:
        stack.enter_context(attention_through_sdpa(model))
        stack.enter_context(replaced(F, "scaled_dot_product_attention", interceptor))
        stack.enter_context(replaced(F, "multi_head_attention_forward", interceptor.multi_head))
        stack.enter_context(trace.following(model))
        stack.enter_context(_Watcher(interceptor, trace))
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


class _Interceptor:
    """Stands in for `scaled_dot_product_attention` while a block is open."""

    def __init__(
        self,
        handle: Callable[[CallArguments], Tensor],
        trace: ModuleTrace,
        thread: int,
        again: Callable[[CallArguments], Tensor],
    ) -> None:
        self.handle, self.trace, self.thread = handle, trace, thread
        self.inside = False
        self.last: CallArguments | None = None
        self.again = again

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        recomputing = in_backward()
        # Another thread's attention (a data loader's, a second model's) is none of ours; autograd
        # recomputes checkpointed layers on a thread of its own, so a backward pass is let through.
        if self.inside or (threading.get_ident() != self.thread and not recomputing):
            return _FUSED(*args, **kwargs)
        self.last = self._bound(*args, **kwargs)
        if recomputing:
            # A checkpointed layer recomputes: same kernel, same graph, nothing recorded twice.
            with self._unwatched():
                return self.again(self.last)
        with self._unwatched():
            return self.handle(self.last)

    @contextmanager
    def _unwatched(self) -> Iterator[None]:
        before, self.inside = self.inside, True
        try:
            yield
        finally:
            self.inside = before

    def _bound(self, *args: Any, **kwargs: Any) -> CallArguments:
        bound = _SIGNATURE.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        query, scale = given["query"], given["scale"]
        name, owner, invocation = self.trace.current()
        return CallArguments(
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

    def by_hand(self, written: HandProduct) -> Tensor:
        """A product of a map and values, handed on like a fused call."""
        name, owner, invocation = self.trace.current()
        if written.where in self.trace.softmaxes:
            self.trace.softmaxes.remove(written.where)
        sizes = written.weights.detach()
        call = CallArguments(
            name=name,
            owner=owner,
            invocation=invocation,
            q=sizes[..., :1],
            k=sizes[..., :1, :].mT,
            v=written.values,
            mask=None,
            causal=False,
            scale=1.0,
            grouped=False,
            written=written,
        )
        with self._unwatched():
            return written.restored(self.handle(call))

    def multi_head(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """`multi_head_attention_forward`, led through the fused path also when weights are asked for."""
        bound = _MULTI_HEAD_SIGNATURE.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        wanted, given["need_weights"] = given["need_weights"], False
        output, _ = _MULTI_HEAD(*bound.args, **bound.kwargs)
        self.trace.tokens.note(output)
        if not wanted or self.last is None:
            return output, None
        call, self.last = self.last, None
        with torch.no_grad(), self._unwatched():
            weights = softmax_map(call.q, call.k, call.mask, call.scale, call.causal)
            weights = weights.mean(1) if given["average_attn_weights"] else weights
            weights = weights.to(call.q.dtype)
        handed = _SideBranch.apply(weights if given["query"].ndim == 3 else weights[0], output)
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


class _Watcher(TorchFunctionMode):
    """Sees what the swapped name cannot: other bindings of the kernel, and mixing of tokens by hand."""

    def __init__(self, interceptor: _Interceptor, trace: ModuleTrace) -> None:
        super().__init__()
        self.interceptor, self.trace = interceptor, trace

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in ATTRIBUTES or self.interceptor.inside:
            return func(*args, **kwargs)
        if func is _FUSED:
            return self.interceptor(*args, **kwargs)
        if not in_backward() and (written := self.trace.hand.product(func, args, kwargs)) is not None:
            return self.interceptor.by_hand(written)
        result = func(*args, **kwargs)
        self.trace.saw_function(func, (*args, *kwargs.values()), result, func in _SOFTMAX)
        return result
