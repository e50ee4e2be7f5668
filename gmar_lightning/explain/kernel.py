"""Attention whose backward shows its map and the map's gradient while it computes what autograd asks for.

A fused kernel recomputes the map in its backward pass and throws it away, so a second visit would pay for it
again. Here the backward is done block by block in the open: `A` (kept by the forward, or computed again), the
gradient at it, `G = dO V^T`, then `dS = A (G - rowsum(dO O))` and from it `dQ`, `dK`, `dV` (the identities are
those of arXiv 2205.14135, section 3). Whoever listens reads everything off the same block of `A` and `G`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from gmar_lightning.explain.blocks import Block, blocks
from gmar_lightning.explain.errors import UnsupportedModelError
from gmar_lightning.explain.intercept import CallArguments, at_least_float32

if TYPE_CHECKING:  # attention.py records through this module
    from gmar_lightning.explain.attention import AttentionCall

Needs = tuple[bool, bool, bool, bool]
NO_GRADS: Needs = (False, False, False, False)


# Memory for attention maps kept from the forward for the backward, per forward pass: layers keep theirs, the first
# ones first, while the sum fits. Fits all 12 layers of ViT-S/16 at 224 px with 8 images (86 MiB); at 1024 px one
# layer alone (192 MiB for 3 heads) does not, and its maps are computed again, block by block, in the backward.
_KEPT_BYTES = 128 * 2**20


@dataclass
class MapBudget:
    """What is left for kept maps in one forward pass, in bytes."""

    left: int = -1

    def takes(self, call: AttentionCall) -> bool:
        """Whether the map of `call` may be kept; if so its part is taken."""
        self.left = _KEPT_BYTES if self.left < 0 else self.left
        # Half precision and autocast stay with the fused kernel: the logits are those the model computes.
        if call.q.dtype not in (torch.float32, torch.float64):
            return False
        size = call.q.shape[:3].numel() * call.k.shape[-2] * call.q.element_size()
        if torch.is_autocast_enabled(call.q.device.type) or size > self.left:
            return False
        self.left -= size
        return True


class Listener(Protocol):
    """Adds up what it wants to know over the blocks of a layer."""

    needs_map: bool
    needs_grad: bool

    def saw_map(self, block: Block, scores: Tensor | None, attention: Tensor) -> None:
        """Take in a block of the map, and its pre-softmax scores (None where the map was kept)."""

    def saw_gradient(self, block: Block, attention: Tensor | None, grad: Tensor) -> None:
        """Take in a block of the gradient at the map, where it is not zero, and of the map."""


@dataclass(eq=False)
class Ticket:
    """Ties a node of the graph to the call it computes; emptied when the recording ends.

    Attributes:
        call: The call; its output is filled in once it is known.
        kept: The map, where the forward kept it.
        peak: Largest pre-softmax logit, `(batch, heads)`, where the map was kept.
        visit: What the backward does: takes the ticket, `dy/dO`, and which gradients are needed.
        visited: Whether the backward came by.
    """

    call: AttentionCall | None
    visit: Callable[[Ticket, Tensor, Needs], tuple[Tensor | None, ...]] | None = None
    kept: Tensor | None = None
    peak: Tensor | None = None
    visited: bool = False

    def clear(self) -> None:
        """Let go of everything: the graph refers to this ticket and this ticket to the graph."""
        self.call = self.visit = self.kept = self.peak = None


class OpenAttention(torch.autograd.Function):
    """The attention of a ticket: forward as the model asked, backward through the ticket's `visit`.

    Nothing goes through `save_for_backward`: a checkpointed layer runs its forward again to refill what was saved,
    and would have to compute the same thing; this way it may run the fused kernel.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, run: Any, ticket: Any
    ) -> Tensor:
        """Note the ticket and compute."""
        ctx.ticket = ticket
        return run()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        """Let the ticket's visitor compute the gradients."""
        ticket: Ticket = ctx.ticket
        if ticket.visit is None:
            raise RuntimeError("this attention was recorded for one explanation, whose recording has ended")
        ticket.visited = True
        return (*ticket.visit(ticket, grad_outputs[0], ctx.needs_input_grad[:4]), None, None)


def opens(given: CallArguments) -> bool:
    """Whether a call has a graph, and queries, keys and values that are dense and of matching shapes."""
    inputs = given.q, given.k, given.v
    if given.written is not None or not torch.is_grad_enabled():
        return False
    if not any(tensor.requires_grad for tensor in inputs):
        return False
    if not all(tensor.ndim == 4 and tensor.layout is torch.strided for tensor in inputs):
        return False
    one_batch = len({len(tensor) for tensor in inputs}) == 1
    return one_batch and given.k.shape[1] == given.v.shape[1] and given.q.shape[1] % given.k.shape[1] == 0


def open_call(
    given: CallArguments, mask: Tensor | None, ticket: Ticket, budget: MapBudget | None, peaks: bool
) -> Tensor:
    """The output of a call that `opens`, computed so that its backward goes through the ticket.

    Args:
        given: The call.
        mask: Its mask, detached where its gradient is not needed.
        ticket: Holds the call; receives the map if that is kept.
        budget: For the map; None keeps none.
        peaks: Note the largest pre-softmax logit where the map is kept.
    """
    call = ticket.call
    ticket.visit = _plain_backward

    def run() -> Tensor:
        if call is None or budget is None or not budget.takes(call):
            return given.compute()
        with torch._C.DisableTorchFunction():  # as in `visit_blocks`
            output, ticket.kept, ticket.peak = explicit_attention(call, peaks)
        return output

    return OpenAttention.apply(given.q, given.k, given.v, mask, run, ticket)  # pyright: ignore[reportReturnType]


def open_again(given: CallArguments) -> Tensor:
    """What the recording computed, for a checkpointed layer: as many tensors saved, never gone back through."""
    if opens(given):
        args = (given.q, given.k, given.v, None, given.compute, Ticket(None, _never_gone_back_through))
        return OpenAttention.apply(*args)  # pyright: ignore[reportReturnType]
    output = given.compute()
    return output if output.requires_grad or not torch.is_grad_enabled() else output.requires_grad_()


def _never_gone_back_through(*args: Any) -> Any:
    raise UnsupportedModelError(
        "attention is computed inside a custom autograd.Function, anew in its backward pass: its maps do not belong "
        "to the model's own graph and cannot be read."
    )


def _plain_backward(ticket: Ticket, output_grad: Tensor, needs: Needs) -> tuple[Tensor | None, ...]:
    """The backward of a call to which nobody listens."""
    assert ticket.call is not None
    return visit_blocks(ticket.call, output_grad, ticket.kept, None, needs)


def explicit_attention(call: AttentionCall, with_peak: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Output, map and (on request) largest logit of a call, block by block."""
    batch, heads, queries, _ = call.q.shape
    keys, width = call.v.shape[-2:]
    kept = call.q.new_empty(batch, heads, queries, keys)
    # Laid out as the fused kernel does, so that the model's transpose(1, 2).reshape(...) stays a view.
    output = call.q.new_empty(batch, queries, heads, width).transpose(1, 2)
    peak = call.q.new_full((batch, heads), -torch.inf) if with_peak else None
    for block in blocks(call):
        part = block.images, block.heads
        scores = block.scores(call)
        if peak is not None:
            peak[part] = torch.maximum(peak[part], scores.amax((-2, -1)))
        torch.softmax(scores, -1, out=kept[(*part, block.rows)])
        output[(*part, block.rows)] = kept[(*part, block.rows)] @ block.of_keys(
            call.v, heads // call.v.shape[1]
        )
    return output, kept, peak


def visit_blocks(
    call: AttentionCall,
    output_grad: Tensor,
    kept: Tensor | None,
    listener: Listener | None,
    needs: Needs,
    span: slice = slice(None),
) -> tuple[Tensor | None, ...]:
    """One visit to every block of `A` and of `G = dO V^T`.

    Args:
        call: The layer.
        output_grad: `dy/dO`, `(batch, heads, queries, value_dim)`.
        kept: The map, where the forward kept it.
        listener: Reads numbers off the blocks.
        needs: Which of the gradients at q, k, v and the mask are wanted.
        span: Query rows outside of which `dy/dO` is zero.

    Returns:
        Those gradients, None where not wanted.
    """
    grads = _InputGrads(call, output_grad, needs) if any(needs) else None
    needs_grad = grads is not None or (listener is not None and listener.needs_grad)
    needs_map = grads is not None or (listener is not None and listener.needs_map)
    # The function mode that watches the model has nothing to see here, and costs as much as a small product.
    # Autocast would take the products to half precision, and in float32 is where everything is reduced.
    with torch.autocast(call.q.device.type, enabled=False), torch._C.DisableTorchFunction():
        for block in blocks(call):
            scores, attention = None, None
            if kept is not None:
                attention = kept[(block.images, block.heads, block.rows)]
            elif needs_map:
                scores = block.scores(call) if call.weights is None else None
                attention = block.attention(call, scores)
            if listener is not None and attention is not None:
                listener.saw_map(block, scores, attention)
            inner = block.within(span)
            if not needs_grad or inner is None:
                continue
            if attention is not None and inner.rows != block.rows:
                begin = inner.rows.start - block.rows.start
                attention = attention[:, :, begin : begin + inner.rows.stop - inner.rows.start]
            value = block.of_keys(call.v, call.q.shape[1] // call.v.shape[1])
            grad = inner.of_queries(output_grad) @ value.mT
            if listener is not None:
                listener.saw_gradient(inner, attention, grad)
            if grads is not None and attention is not None:
                grads.add(inner, attention, grad)
    return (None,) * 4 if grads is None else grads.results()


def span_of(output_grad: Tensor) -> slice:
    """The query rows outside of which the gradient is zero; waits for the device."""
    (rows,) = torch.nonzero((output_grad != 0).any(-1).flatten(0, 1).any(0), as_tuple=True)
    return slice(int(rows[0]), int(rows[-1]) + 1) if len(rows) else slice(0, 0)


class _InputGrads:
    """Gradients at queries, keys, values and mask of a layer, added up over its blocks."""

    def __init__(self, call: AttentionCall, output_grad: Tensor, needs: Needs) -> None:
        self.call, self.output_grad, self.needs = call, output_grad, needs
        self.heads = call.q.shape[1]
        dtype = torch.promote_types(call.q.dtype, torch.float32)
        # rowsum(A G) = rowsum(dO O), without the map.
        self.delta = (at_least_float32(output_grad) * at_least_float32(call.output.detach())).sum(-1, True)
        self.q = torch.zeros_like(call.q, dtype=dtype) if needs[0] else None
        self.k, self.v = (
            tensor.new_zeros(tensor.shape[0], self.heads, *tensor.shape[2:], dtype=dtype) if needed else None
            for tensor, needed in ((call.k, needs[1]), (call.v, needs[2]))
        )
        self.mask = None
        if needs[3] and call.mask is not None:
            self.mask = call.mask.new_zeros((1,) * (4 - call.mask.ndim) + call.mask.shape, dtype=dtype)

    def add(self, block: Block, attention: Tensor, grad: Tensor) -> None:
        """Take in a block of the map and of the gradient at it, which is overwritten."""
        call, part = self.call, (block.images, block.heads)
        if self.v is not None:
            self.v[part] += attention.mT @ block.of_queries(self.output_grad)
        at_scores = grad.sub_(self.delta[(*part, block.rows)]).mul_(attention)
        if self.mask is not None:
            # A mask is broadcast over the axes where it has length 1.
            sides = zip(self.mask.shape, (*part, block.rows, slice(None)), strict=True)
            own = self.mask[tuple(slice(None) if size == 1 else cut for size, cut in sides)]
            own += at_scores.sum_to_size(own.shape)
        if self.q is not None:
            key = block.of_keys(call.k, self.heads // call.k.shape[1])
            self.q[(*part, block.rows)] = (at_scores @ key).mul_(call.scale)
        if self.k is not None:
            self.k[part] += at_scores.mT @ (block.of_queries(call.q) * call.scale)

    def results(self) -> tuple[Tensor | None, ...]:
        """The gradients, each in the shape and precision of its tensor."""
        call = self.call
        mask = None if self.mask is None or call.mask is None else self.mask.reshape(call.mask.shape)
        pairs = ((self.q, call.q), (_grouped(self.k, call.k), call.k), (_grouped(self.v, call.v), call.v))
        grads = [None if grad is None else grad.to(tensor.dtype) for grad, tensor in pairs]
        return (*grads, None if mask is None or call.mask is None else mask.to(call.mask.dtype))


def _grouped(grad: Tensor | None, tensor: Tensor) -> Tensor | None:
    """Sum over the query heads that share a key head."""
    if grad is None or grad.shape[1] == tensor.shape[1]:
        return grad
    return grad.unflatten(1, (tensor.shape[1], -1)).sum(2)
