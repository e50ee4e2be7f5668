"""Every attention call of a forward pass, recorded in place while the fused kernels run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from gmar_lightning.explain.errors import UnsupportedModelError
from gmar_lightning.explain.intercept import (
    CallArguments,
    at_least_float32,
    intercept_attention,
    one_per_head,
    softmax_map,
)
from gmar_lightning.explain.kernel import MapBudget, Ticket, open_again, open_call, opens
from gmar_lightning.explain.trace import ModuleTrace


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


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
        index: Number of the call in its pass, those that the images do not reach counted as well.
        edge: Where the output entered the graph; None when it was computed without one.
        weights: The map itself, detached, for attention written by hand; queries and keys then stand for their
            sizes alone.
        values: The values, attached to the graph.
        entering: What the module that made the call was given.
        arrange: Brings a gradient at `edge` to the shape of `output`.
        heads_first: Whether heads were merged into the batch in front of the images, `(heads * batch, ...)`.
        mixers_before: How many places outside the attention had mixed tokens when the call was made.
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
    index: int = 0
    edge: GradientEdge | None = None
    weights: Tensor | None = None
    values: Tensor | None = None
    entering: tuple[Tensor, ...] = ()
    arrange: Callable[[Tensor], Tensor] = _as_it_is
    heads_first: bool = False
    mixers_before: int = 0

    @property
    def is_pool(self) -> bool:
        """Whether one query gathers all tokens: an attention pool, whose own row is where a rollout starts."""
        return self.q.ndim == 4 and self.q.shape[-2] == 1 < self.k.shape[-2]

    def per_head(self, which: Literal["k", "v"]) -> Tensor:
        """Keys or values with one entry per query head, `(batch, heads, keys, dim)`, in at least float32."""
        return at_least_float32(one_per_head(getattr(self, which), self.q.shape[1]))

    def attention(self, rows: slice = slice(None)) -> Tensor:
        """The softmaxed attention map of some query rows, `(batch, heads, rows, keys)`."""
        if self.weights is not None:
            # The model's own map, which its graph still needs.
            # A copy: callers work on the map in place.
            return at_least_float32(self.weights[:, :, rows]).clone()
        return softmax_map(self.q, self.k, self.mask, self.scale, self.causal, rows)


@dataclass
class Recording:
    """What one forward pass showed: its attention calls and the trace of its modules.

    Attributes:
        calls: The calls, in forward order.
        aside: Calls that the explained images do not reach by gradient, in order: a text tower beside an image
            tower, a teacher under `no_grad`.
        trace: What the modules did.
        batch: Images in the pass, set before it; None leaves the calls in the shape they were made in.
        image: The node at the head of the images' graph, set before the pass; None takes every call as reached.
        entered: Queries, keys and values of the first call, attached.
        tickets: One for each call, when the recording is open to the backward pass.
        opened: All tickets that the graph refers to.
        budget: Memory for kept maps.
    """

    calls: list[AttentionCall] = field(default_factory=list)
    aside: list[AttentionCall] = field(default_factory=list)
    trace: ModuleTrace = field(default_factory=ModuleTrace)
    batch: int | None = None
    image: Any = None
    entered: tuple[Tensor, ...] = ()
    tickets: list[Ticket] = field(default_factory=list)
    opened: list[Ticket] = field(default_factory=list)
    budget: MapBudget = field(default_factory=MapBudget)

    @property
    def folded(self) -> bool:
        """Whether some call attends within windows, several to an image."""
        return any(len(call.q) != self.batch for call in self.calls)

    def reached(self, tensors: tuple[Tensor, ...]) -> bool:
        """Whether the images reach any of some tensors by gradient."""
        if self.image is None or any(_feeds(call, tensors) for call in self.calls[-2:]):
            return True
        return reaches([t.grad_fn for t in tensors if t.grad_fn is not None], {self.image})

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
    computed = functools.partial(_opened, peaks=peaks) if open_backward else _closed

    def record(given: CallArguments) -> Tensor:
        if torch._C._functorch.is_functorch_wrapped_tensor(given.q):  # pyright: ignore[reportAttributeAccessIssue]
            raise UnsupportedModelError(
                f"{given.name} ({given.owner}) attends inside torch.vmap or another transform of torch.func: "
                "its maps belong to the transform and cannot be followed. Call the model on the whole batch."
            )
        index = len(found.calls) + len(found.aside)
        if not found.reached(given.reads):
            call = _recorded(given, found.trace, index=index)
            output, ticket = computed(given, call, found, None)
            ticket.call = _with_output(call, output)
            found.aside.append(ticket.call)
            found.trace.saw_call()
            return output
        depth, detached = _place(found.calls, given.reads)
        beside = [place for place, other in enumerate(found.calls) if other.depth == depth and not detached]
        twin = any(
            invocations[place] == given.invocation or _same_values(found.calls[place].v, given.v)
            for place in beside
        )
        call = _recorded(given, found.trace, index=index, depth=depth, twin=twin, detached=detached)
        output, ticket = computed(given, call, found, found.budget)
        # A frozen backbone under frozen embeddings has no graph; it begins at the first attention output.
        if torch.is_grad_enabled() and not output.requires_grad:
            output.requires_grad_()
        invocations.append(given.invocation)
        if not found.calls:
            found.entered = (given.q, given.k, given.v) if given.written is None else (given.v,)
        ticket.call = _with_output(call, output)
        found.calls.append(ticket.call)
        found.tickets.append(ticket)
        found.trace.saw_call()
        if output.ndim == 4:
            found.trace.saw_attention(len(output), output.shape[-2], given.k.shape[-2])
        elif found.batch and output.ndim in (3, 5) and len(output) % found.batch == 0:
            # Merged or grouped heads: the tokens around the call have one row per image.
            found.trace.saw_attention(found.batch, output.shape[-2], given.k.shape[-2])
        return output

    try:
        with intercept_attention(model, record, found.trace, open_again if open_backward else None):
            yield found
    finally:
        for ticket in found.opened:
            ticket.clear()


def _closed(
    given: CallArguments, call: AttentionCall, found: Recording, budget: MapBudget | None
) -> tuple[Tensor, Ticket]:
    return given.compute(), Ticket(call)


def _opened(
    given: CallArguments, call: AttentionCall, found: Recording, budget: MapBudget | None, *, peaks: bool
) -> tuple[Tensor, Ticket]:
    if not opens(given):
        return _closed(given, call, found, budget)
    ticket, mask = Ticket(call), given.mask
    found.opened.append(ticket)
    # The gradient of a learned bias is not needed; that of a mask computed from tokens is.
    if mask is not None and not any(_feeds(earlier, (mask,)) for earlier in found.calls[:1]):
        # Autograd would else form the gradient of the whole map for it, `(batch, heads, queries, keys)`.
        mask = mask.detach()
    return open_call(given, mask, ticket, budget, peaks), ticket


def _recorded(given: CallArguments, trace: ModuleTrace, **place: Any) -> AttentionCall:
    """A call before its output is known; the values stand in its place."""
    return AttentionCall(
        name=given.name,
        q=_kept(given.q),
        k=_kept(given.k),
        v=_kept(given.v),
        mask=None if given.mask is None else _kept(given.mask),
        scale=given.scale,
        output=given.v.detach(),
        causal=given.causal,
        owner=given.owner,
        shared_qkv=given.q is given.k and given.k is given.v,
        weights=None if given.written is None else given.written.weights.detach(),
        values=given.v,
        entering=trace.entering(),
        mixers_before=len(trace.mixers),
        **place,
    )


def _kept(tensor: Tensor) -> Tensor:
    # A learned query or bias is copied: sharding frees the memory of weights when their module has run.
    learned = isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)
    return tensor.detach().clone() if learned else tensor.detach()


def _with_output(call: AttentionCall, output: Tensor) -> AttentionCall:
    edge = get_gradient_edge(output) if output.requires_grad else None
    return replace(call, output=output, edge=edge)


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
    # Nodes are numbered in the order they were made: nothing older than the call can have come from it,
    # which keeps the walk within one block.
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
    # Differential attention calls the kernel twice on one tensor of values, perhaps through two views of
    # it.
    return one.shape == other.shape and one.data_ptr() == other.data_ptr() and one.stride() == other.stride()
