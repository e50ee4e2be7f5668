"""Every attention call of a forward pass, recorded in place while the fused kernels run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from gmar_lightning.explain.intercept import (
    CallArguments,
    at_least_float32,
    intercept_attention,
    one_per_head,
    softmax_map,
)
from gmar_lightning.explain.kernel import OpenAttention, Ticket, explicit_attention, visit_blocks
from gmar_lightning.explain.trace import ModuleTrace


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
        twin: Whether another call beside this one was made in the same invocation of a module, or on the
            same values.
        detached: Whether this call continues another chain than the calls before it.
        edge: Where the output entered the graph; None when it was computed without one.
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
    detached: bool = False
    edge: GradientEdge | None = None

    @property
    def is_pool(self) -> bool:
        """Whether one query gathers all tokens: an attention pool, whose own row is where a rollout starts."""
        return self.q.ndim == 4 and self.q.shape[-2] == 1 < self.k.shape[-2]

    def per_head(self, which: Literal["k", "v"]) -> Tensor:
        """Keys or values with one entry per query head, `(batch, heads, keys, dim)`, in at least float32."""
        return at_least_float32(one_per_head(getattr(self, which), self.q.shape[1]))

    def attention(self, rows: slice = slice(None)) -> Tensor:
        """The softmaxed attention map of some query rows, `(batch, heads, rows, keys)`."""
        return softmax_map(self.q, self.k, self.mask, self.scale, self.causal, rows)


# Memory for attention maps kept from the forward for the backward, per forward pass: layers keep theirs, the first
# ones first, while the sum fits. Fits all 12 layers of ViT-S/16 at 224 px with 8 images (86 MiB); at 1024 px one
# layer alone (192 MiB for 3 heads) does not, and its maps are computed again, block by block, in the backward.
_KEPT_BYTES = 128 * 2**20


@dataclass
class Recording:
    """What one forward pass showed: its attention calls and the trace of its modules.

    Attributes:
        calls: In forward order.
        trace: What ran.
        tickets: One for each call, when the recording is open to the backward pass.
    """

    calls: list[AttentionCall] = field(default_factory=list)
    trace: ModuleTrace = field(default_factory=ModuleTrace)
    tickets: list[Ticket] = field(default_factory=list)
    kept_bytes: int = 0

    def keeps(self, call: AttentionCall) -> bool:
        """Whether the budget allows to keep the map of `call`, and takes its part."""
        # Half precision and autocast stay with the fused kernel: the logits are those the model computes.
        if call.q.dtype not in (torch.float32, torch.float64) or torch.is_autocast_enabled(
            call.q.device.type
        ):
            return False
        size = call.q.shape[:3].numel() * call.k.shape[-2] * call.q.element_size()
        if self.kept_bytes + size > _KEPT_BYTES:
            return False
        self.kept_bytes += size
        return True

    def forget_unread_pool(self, logits: Tensor) -> None:
        """Drop a final attention pool that ran, but whose result the logits do not use."""
        if len(self.calls) < 2 or not self.calls[-1].is_pool or logits.grad_fn is None:
            return
        edge = self.calls[-1].edge
        if edge is not None and not reaches([logits.grad_fn], {edge.node}):
            self.calls.pop()
            del self.tickets[len(self.calls) :]
            self.trace.tokens.leaving = self.trace.tokens.before_pool


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
def recording(model: nn.Module, *, open_backward: bool = False, peaks: bool = False) -> Iterator[Recording]:
    """As `record_attention`, with the trace that `TokenLayout` needs to derive the picture.

    Args:
        model: The module whose paths name the calls.
        open_backward: Lead the backward of every call through its ticket's `visit`, and keep small maps.
        peaks: Note the largest pre-softmax logit where a map is kept.

    Yields:
        What was recorded; its tickets are emptied when the block ends.
    """
    found = Recording()
    invocations: list[int] = []

    def record(given: CallArguments) -> Tensor:
        depth, detached = _place(found.calls, (given.q, given.k, given.v))
        beside = [index for index, other in enumerate(found.calls) if other.depth == depth and not detached]
        twin = any(
            invocations[index] == given.invocation or _same_values(found.calls[index].v, given.v)
            for index in beside
        )
        call = AttentionCall(
            name=given.name,
            q=given.q.detach(),
            k=given.k.detach(),
            v=given.v.detach(),
            mask=None if given.mask is None else given.mask.detach(),
            scale=given.scale,
            output=given.q.detach(),
            causal=given.causal,
            depth=depth,
            owner=given.owner,
            shared_qkv=given.q is given.k and given.k is given.v,
            twin=twin,
            detached=detached,
        )
        ticket = Ticket(call)
        output = _opened(given, ticket, found, peaks) if open_backward else given.compute()
        if torch.is_grad_enabled() and not output.requires_grad:
            output.requires_grad_()
        call = replace(call, output=output, edge=get_gradient_edge(output) if output.requires_grad else None)
        ticket.call = call
        invocations.append(given.invocation)
        found.calls.append(call)
        found.tickets.append(ticket)
        if output.ndim == 4:
            found.trace.saw_attention(len(output), output.shape[-2], given.k.shape[-2])
        return output

    try:
        with intercept_attention(model, record, found.trace, _again if open_backward else None):
            yield found
    finally:
        for ticket in found.tickets:
            ticket.clear()


def _opened(given: CallArguments, ticket: Ticket, found: Recording, peaks: bool) -> Tensor:
    """The output of a call, computed so that its backward goes through the ticket."""
    call, inputs = ticket.call, (given.q, given.k, given.v)
    attached = any(tensor.requires_grad for tensor in inputs)
    if call is None or not (attached and torch.is_grad_enabled() and _is_plain(call)):
        return given.compute()

    def run() -> Tensor:
        if not found.keeps(call):
            return given.compute()
        output, ticket.kept, ticket.peak = explicit_attention(call, peaks)
        return output

    ticket.visit = _plain_backward
    mask = given.mask
    # The gradient of a learned bias is not needed; that of a mask computed from tokens is.
    if mask is not None and not any(_feeds(earlier, (mask,)) for earlier in found.calls[:1]):
        mask = mask.detach()
    return OpenAttention.apply(*inputs, mask, run, ticket)  # pyright: ignore[reportReturnType]


def _again(given: CallArguments) -> Tensor:
    """What `_opened` returned, for a checkpointed layer: same graph, no tensor saved, never gone back through."""
    ticket = Ticket(None)
    if not any(tensor.requires_grad for tensor in (given.q, given.k, given.v)):
        return given.compute().requires_grad_()
    return OpenAttention.apply(given.q, given.k, given.v, None, given.compute, ticket)  # pyright: ignore


def _plain_backward(ticket: Ticket, output_grad: Tensor, needs: Any) -> tuple[Tensor | None, ...]:
    """The backward of a call to which nobody listens."""
    assert ticket.call is not None
    return visit_blocks(ticket.call, output_grad, ticket.kept, None, needs)


def _is_plain(call: AttentionCall) -> bool:
    """Whether queries, keys and values are dense and of matching shapes; anything else is refused, or a leaf."""
    shapes = [tensor.shape for tensor in (call.q, call.k, call.v)]
    dense = all(tensor.layout is torch.strided for tensor in (call.q, call.k, call.v))
    return (
        dense
        and all(
            len(shape) == 4 and shape[0] == shapes[0][0] and shape[1] == shapes[1][1] for shape in shapes[1:]
        )
        and shapes[0][1] % shapes[1][1] == 0
        and len(shapes[0]) == 4
    )


def _place(calls: Sequence[AttentionCall], tensors: tuple[Tensor, ...]) -> tuple[int, bool]:
    """Depth of a call that reads `tensors`, and whether it leaves the chain of calls before it.

    A call either reads every call of the depth before it (and goes one deeper), or none of that depth but
    every call of the one before (and stands beside it). Anything else is a second chain.
    """
    if not calls:
        return 0, False
    deepest = calls[-1].depth
    fed = [_feeds(call, tensors) for call in calls if call.depth == deepest]
    if all(fed):
        return deepest + 1, False
    beside = all(_feeds(call, tensors) for call in calls if call.depth == deepest - 1)
    return deepest, any(fed) or not beside


def _feeds(call: AttentionCall, tensors: tuple[Tensor, ...]) -> bool:
    """Whether `tensors` were computed from a call's output, read off the autograd graph."""
    if call.edge is None:
        return True
    starts = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    return reaches(starts, {call.edge.node}, oldest=_age(call.edge.node))


def reaches(starts: Sequence[Any], targets: set[Any], *, barrier: Any = None, oldest: int = 0) -> bool:
    """Whether a walk along the autograd graph, from results to what they came from, meets a target.

    Args:
        starts: Graph nodes of the results.
        targets: Nodes looked for.
        barrier: A node that the walk does not enter.
        oldest: Sequence number below which nodes are too old to have come from a target.
    """
    stack = [node for node in starts if node is not barrier]
    seen = set(stack)
    while stack:
        node = stack.pop()
        if node in targets:
            return True
        for parent, _ in node.next_functions:
            if parent is None or parent in seen or parent is barrier:
                continue
            if parent in targets or _age(parent) >= oldest:
                seen.add(parent)
                stack.append(parent)
    return False


def _age(node: Any) -> int:
    # Leaves carry the largest sequence number there is, and lead nowhere.
    return node._sequence_nr() if node.next_functions else -1


def _same_values(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.data_ptr() == other.data_ptr() and one.stride() == other.stride()
