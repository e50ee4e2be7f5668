"""One forward and one backward of a batch, and what they show of every attention layer."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from gmar_lightning.explain.attention import AttentionCall, Recording, recording
from gmar_lightning.explain.errors import NoPictureError, UnsupportedModelError
from gmar_lightning.explain.explained import Explained, check_images_apart, explained, held, runner_up
from gmar_lightning.explain.folding import check_over_tokens, fold_numbers, folded, is_plain
from gmar_lightning.explain.head import check_class_scores
from gmar_lightning.explain.inputs import (
    ForwardError,
    Goal,
    batch_size,
    image_key,
    padding_of,
    raise_from_forward,
    watched_forward,
)
from gmar_lightning.explain.kernel import NO_GRADS, Needs, Ticket
from gmar_lightning.explain.mixing import check_apart
from gmar_lightning.explain.output import Output
from gmar_lightning.explain.readout import check_rows_apart, readout, without_masked
from gmar_lightning.explain.refusals import (
    by_hand,
    check_differentiable,
    check_plain_attention,
    check_reached,
    check_visible,
)
from gmar_lightning.explain.stages import last_stage, stage_layout
from gmar_lightning.explain.sweep import Form, LayerNumbers, Sweep, visit
from gmar_lightning.explain.tokens import TokenLayout, token_layout

_NO_LAYOUT = TokenLayout(0, None)


@dataclass(frozen=True, eq=False)
class Picture:
    """Which layers a rollout runs over, and how it becomes a picture.

    Attributes:
        first: Index of the first layer of the rollout; all that follow belong to it.
        start: The readout row, `(batch, tokens)`.
        layout: Where the patches are.
        padding: `(batch, tokens)`, 0 at padding; None without any.
    """

    first: int
    start: Tensor
    layout: TokenLayout
    padding: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Measured:
    """What one forward and one backward showed of a batch.

    Attributes:
        layers: Path of each attention layer.
        numbers: The numbers of every layer.
        sweep: The rows of the rollout; None without a picture.
        picture: How they become a picture; None without one.
        explained: The number explained, and the logits if there are any.
        scope: "whole", "last stage, 7 x 7", or "none: " and the reason.
        runner_up: The final row of the first form for the runner-up class, `(batch, tokens)`; None unless it was
            asked for and the picture is whole.
    """

    layers: tuple[str, ...]
    numbers: list[LayerNumbers]
    sweep: Sweep | None
    picture: Picture | None
    explained: Explained
    scope: str
    runner_up: Tensor | None = None


def measure(
    classifier: nn.Module, inputs: dict[str, Any], goal: Goal, form: Form, kind: Output | None = None
) -> Measured | None:
    """Forward and backward; None when the batch is as long as the token axis and the two look alike."""
    check_differentiable(classifier)
    try:
        return _measure(classifier, inputs, goal, form, kind)
    except ForwardError as failed:
        error = failed
    raise_from_forward(error, classifier, inputs)
    return None


def _measure(
    classifier: nn.Module, inputs: dict[str, Any], goal: Goal, form: Form, kind: Output | None
) -> Measured | None:
    with recording(classifier, open_backward=True, peaks=form.signals) as found:
        batch = found.batch = batch_size(inputs)
        output, image = _forward(classifier, inputs, found)
        seen = explained(output, goal, batch, kind)
        found.forget_unread_pool(seen.score)
        check_visible(found)
        if seen.logits is not None:
            check_class_scores(found, seen.logits, image)
        if not all(is_plain(call, batch) for call in found.calls):
            found.calls = folded(found.calls, batch, image)
            found.entered = tuple(x for x in (found.calls[0].values,) if x is not None)
        if seen.targets is None:
            check_images_apart(seen.score, found.calls[-1], batch, goal)
        if batch == found.calls[0].k.shape[-2] > 1 and not found.folded:
            return None
        picture, scope = _picture(classifier, inputs, found, seen, image)
        if scope != "whole" and found.trace.suspects:
            # Whether such a softmax mixes tokens is tried out in models of one set of tokens alone.
            raise UnsupportedModelError(by_hand(found.trace.suspects))
        if picture is not None and scope == "whole" and _passes_in_order(found):
            sweep = Sweep(found.calls, picture.start, form, picture.layout, picture.padding)
            twice = form.runner_up and seen.logits is not None and seen.logits.shape[1] > 1
            _backward(found, sweep, seen.score, retain_graph=twice)
            other = _runner_up_row(found, picture, seen, form) if twice else None
            numbers = [sweep.layers[index] for index in range(len(found.calls))]
            picture = replace(picture, start=sweep.readout)
            measured = replace(_measured(found, numbers, sweep, picture, seen, scope), runner_up=other)
        else:
            measured = _measured_at_the_end(found, picture, seen, form, scope, batch)
    if measured.picture is not None and scope == "whole":
        start, padding = measured.picture.start, measured.picture.padding
        try:
            check_apart(classifier, inputs, found, start, padding, held(goal, output))
        except UnsupportedModelError as error:
            if not found.trace.suspects:
                raise
            raise UnsupportedModelError(by_hand(found.trace.suspects)) from error
    return measured


def _measured_at_the_end(
    found: Recording, picture: Picture | None, seen: Explained, form: Form, scope: str, batch: int
) -> Measured:
    """Take the gradients of all layers first, and visit the layers then."""
    grads = _grads(found, seen.score, [call.edge for call in found.calls], scope)
    if picture is not None and not found.calls[-1].is_pool:
        last = _last_depth(found.calls, grads)
        try:
            check_rows_apart(*last, picture.start)
        except UnsupportedModelError as error:
            if scope == "whole":
                raise
            picture, scope = None, f"none: {error}"
        if picture is not None and scope == "whole":
            picture = replace(picture, start=without_masked(picture.start, last[1]))
    return _numbers(found, grads, picture, seen, form, scope, batch)


def _passes_in_order(found: Recording) -> bool:
    """Whether the backward passes every layer but the first ones in the open, and one layer before all others."""
    first, last = found.calls[0].depth, found.calls[-1].depth
    opened = [ticket.visit is not None for ticket in found.tickets]
    before = [call.depth for call in found.calls[:-1]]
    return last not in before and all(
        is_open or call.depth == first for call, is_open in zip(found.calls, opened, strict=True)
    )


def _picture(
    classifier: nn.Module, inputs: Mapping[str, Any], found: Recording, seen: Explained, image: Tensor | None
) -> tuple[Picture | None, str]:
    """Where a rollout starts, runs and ends; without one, why."""
    batch, total = len(seen.score), seen.score.sum()
    try:
        check_plain_attention(found, batch)
    except NoPictureError as error:
        return _stage_picture(found, total, image, batch, error)
    tokens = found.calls[0].k.shape[-2]
    padding = padding_of(inputs, tokens)
    try:
        layout = token_layout(found, classifier, image)
        return Picture(0, readout(found, total, image), layout, padding), "whole"
    except UnsupportedModelError as error:
        # A class is read in ways that are known; another number may read the tokens in any way.
        if seen.targets is not None:
            raise
        check_over_tokens(found.calls)
        return None, f"none: {error}"


def _stage_picture(
    found: Recording, total: Tensor, image: Tensor | None, batch: int, why: NoPictureError
) -> tuple[Picture | None, str]:
    check_over_tokens(found.calls)
    try:
        stage = last_stage(found, found.calls, batch)
        layout = stage_layout(stage, image)
        start = readout(stage, total, image)
    except UnsupportedModelError as error:
        return None, f"none: {why} {error}"
    assert layout.grid is not None
    first = len(found.calls) - len(stage.calls)
    return Picture(first, start, layout), f"last stage, {layout.grid[0]} x {layout.grid[1]}"


def _grads(found: Recording, score: Tensor, edges: Any, scope: str) -> list[Tensor]:
    """`dy/dO` of every layer, arranged like its output; zero where the number does not depend on it."""
    _check_attached(score)
    grads = torch.autograd.grad(score.sum(), edges, allow_unused=True)
    if scope == "whole":
        check_reached(found.calls, grads)
    elif not any(grad is not None for grad in grads):
        raise UnsupportedModelError("the explained number depends on no attention layer of the model.")
    return [
        torch.zeros_like(call.output) if grad is None else call.arrange(grad)
        for call, grad in zip(found.calls, grads, strict=True)
    ]


def _numbers(
    found: Recording,
    grads: list[Tensor],
    picture: Picture | None,
    seen: Explained,
    form: Form,
    scope: str,
    batch: int,
) -> Measured:
    calls, first, sweep = found.calls, len(found.calls), None
    numbers: list[LayerNumbers] = []
    alone = replace(form, head_maps=False)
    if picture is not None:
        first = picture.first
        sweep = Sweep(calls[first:], picture.start, form, picture.layout, picture.padding)
    for index in reversed(range(len(calls))):
        if sweep is not None and index >= first:
            sweep.take(index - first, grads.pop())
            numbers.insert(0, sweep.layers[index - first])
        else:
            layer = visit(calls[index], grads.pop(), alone, _NO_LAYOUT)
            numbers.insert(0, fold_numbers(layer, batch, form.norm))
    return _measured(found, numbers, sweep, picture, seen, scope)


def _measured(
    found: Recording,
    numbers: list[LayerNumbers],
    sweep: Sweep | None,
    picture: Picture | None,
    seen: Explained,
    scope: str,
) -> Measured:
    calls = found.calls
    logits = None if seen.logits is None else seen.logits.detach()
    kept = replace(seen, score=seen.score.detach(), logits=logits)
    return Measured(tuple(_named(call, calls) for call in calls), numbers, sweep, picture, kept, scope)


def _named(call: AttentionCall, calls: list[AttentionCall]) -> str:
    """Path of a layer; sub-maps of a twin call are told apart by number."""
    if not call.twin and not any(other.twin and other.name == call.name for other in calls):
        return call.name
    alike = [other for other in calls if other.name == call.name]
    return (
        f"{call.name}:{next(i for i, other in enumerate(alike) if other is call)}"
        if len(alike) > 1
        else call.name
    )


def _forward(classifier: nn.Module, inputs: dict[str, Any], found: Recording) -> tuple[Any, Tensor | None]:
    """The output, and the images at the head of its graph."""
    key = image_key(inputs)
    if key is None or not inputs[key].is_floating_point():
        return watched_forward(classifier, inputs), None if key is None else inputs[key]
    # The copy is no leaf, so that a model may normalise its input in place, and never the caller's.
    image = inputs[key].detach().requires_grad_().clone()
    found.image = image.grad_fn
    return watched_forward(classifier, {**inputs, key: image}), image


def _check_attached(score: Tensor) -> None:
    if not score.requires_grad:
        raise UnsupportedModelError(
            "the explained number carries no gradient: the forward detaches its output."
        )


def _runner_up_row(found: Recording, picture: Picture, seen: Explained, form: Form) -> Tensor:
    """The row of the first form for the runner-up class: a second backward through the graph of the first.

    Kept maps are gone by then and are computed again; what the graph holds until here is what it held when the
    first backward began, so the peak of memory stays where it was.
    """
    assert seen.logits is not None
    assert seen.targets is not None
    others = runner_up(seen.logits.detach(), seen.targets)
    alone = Form(form.norm, form.rollouts[:1], form.residual)
    sweep = Sweep(found.calls, picture.start, alone, picture.layout, picture.padding)
    _backward(found, sweep, seen.logits.gather(1, others[:, None])[:, 0])
    return sweep.maps()[form.rollouts[0]]


def _backward(found: Recording, sweep: Sweep, score: Tensor, retain_graph: bool = False) -> None:
    """From the score to the first attention layer, and no further; every layer is taken in as it is passed."""
    _check_attached(score)
    calls, tickets, start = found.calls, found.tickets, sweep.readout
    for index, ticket in enumerate(tickets):
        ticket.visited = False
        if ticket.visit is not None:
            ticket.visit = functools.partial(_visit, sweep, index)
    last, first = calls[-1].depth, calls[0].depth
    # Asked for is the gradient where the backward starts and where it ends; what lies between is only passed.
    asked = [
        i
        for i, (call, ticket) in enumerate(zip(calls, tickets, strict=True))
        if call.depth in (first, last) or ticket.visit is None
    ]
    edges: Any = [calls[index].edge for index in asked]
    found_grads = torch.autograd.grad(score.sum(), edges, allow_unused=True, retain_graph=retain_graph)
    grads = dict(zip(asked, found_grads, strict=True))
    passed = [score if ticket.visited else grads.get(index) for index, ticket in enumerate(tickets)]
    check_reached(calls, passed)
    for index in reversed(asked):
        grad = grads.pop(index)
        grad = None if grad is None else calls[index].arrange(grad)
        if calls[index].depth == last and not calls[-1].is_pool and grad is not None:
            check_rows_apart([calls[index]], [grad], start)
        if not tickets[index].visited and grad is not None:
            _visit(sweep, index, tickets[index], grad, NO_GRADS)


def _visit(
    sweep: Sweep, index: int, ticket: Ticket, output_grad: Tensor, needs: Needs
) -> tuple[Tensor | None, ...]:
    kept, ticket.kept = ticket.kept, None  # freed as soon as it is reduced
    # The function mode that watches the model has nothing to see in what is computed here.
    with torch._C.DisableTorchFunction():
        if index == len(sweep.calls) - 1 and not sweep.calls[index].is_pool:
            sweep.start_at(without_masked(sweep.readout, [output_grad]))
        return sweep.take(index, output_grad, kept, ticket.peak, needs)


def _last_depth(calls: list[AttentionCall], grads: list[Tensor]) -> tuple[list[AttentionCall], list[Tensor]]:
    count = sum(call.depth == calls[-1].depth for call in calls)
    return calls[-count:], grads[-count:]
