"""One forward and one backward of a batch, and what they show of every attention layer."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gmar_lightning.explain.attention import Recording, recording
from gmar_lightning.explain.inputs import forward, image_key, logits_of, padding_of
from gmar_lightning.explain.kernel import Needs, Ticket
from gmar_lightning.explain.readout import check_rows_apart, readout
from gmar_lightning.explain.refusals import check_plain_attention, check_reached
from gmar_lightning.explain.sweep import Form, Sweep
from gmar_lightning.explain.tokens import TokenLayout, token_layout


@dataclass(frozen=True, eq=False)
class Measured:
    """What one forward and one backward showed of a batch.

    Attributes:
        sweep: The numbers of every layer, and the rows that go through them.
        layout: Where the patches are.
        padding: `(batch, tokens)`, 0 at padding; None without any.
        logits: `(batch, classes)`.
        targets: `(batch,)`.
        score: `(batch,)`, the number explained.
    """

    sweep: Sweep
    layout: TokenLayout
    padding: Tensor | None
    logits: Tensor
    targets: Tensor
    score: Tensor


def measure(
    classifier: nn.Module, inputs: dict[str, Any], targets: Tensor | None, form: Form
) -> Measured | None:
    """Forward and backward; None when the batch is as long as the token axis and the two look alike."""
    with recording(classifier, open_backward=True, peaks=form.signals) as found:
        logits, image = _forward(classifier, inputs)
        batch = len(logits)
        found.forget_unread_pool(logits)
        check_plain_attention(found, batch)
        tokens = found.calls[0].k.shape[-2]
        if batch == tokens > 1:
            return None
        padding = padding_of(inputs, tokens)
        layout = token_layout(found, classifier, image)
        goals = logits.argmax(-1) if targets is None else targets.to(logits.device)
        if goals.max() >= logits.shape[1]:
            raise ValueError(
                f"targets name class {int(goals.max())}, but the model has {logits.shape[1]} classes"
            )
        scores = logits.gather(1, goals[:, None])[:, 0]
        start = readout(found, scores.sum(), image)
        sweep = Sweep(found.calls, start, form, layout, padding)
        _backward(found, sweep, scores.sum(), start)
    return Measured(sweep, layout, padding, logits.detach(), goals, scores.detach())


def _forward(classifier: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """Logits, and the images at the head of their graph."""
    key = image_key(inputs)
    if key is None or not inputs[key].is_floating_point():
        return logits_of(forward(classifier, inputs)), None if key is None else inputs[key]
    # The copy is no leaf, so that a model may normalise its input in place, and never the caller's.
    image = inputs[key].detach().requires_grad_().clone()
    return logits_of(forward(classifier, {**inputs, key: image})), image


def _backward(found: Recording, sweep: Sweep, score: Tensor, start: Tensor) -> None:
    """From the score to the first attention layer, and no further; every layer is taken in as it is passed."""
    calls, tickets = found.calls, found.tickets
    for index, ticket in enumerate(tickets):
        if ticket.visit is not None:
            ticket.visit = functools.partial(_visit, sweep, index)
    last, first = calls[-1].depth, calls[0].depth
    # The gradient is asked for where the backward ends and where it starts. What lies between is only passed.
    asked = [index for index, call in enumerate(calls) if call.depth in (first, last)]
    edges: Any = [calls[index].edge for index in asked]
    grads: dict[int, Tensor | None] = dict(
        zip(asked, torch.autograd.grad(score, edges, allow_unused=True), strict=True)
    )
    reached = [grads.get(index) if not ticket.visited else start for index, ticket in enumerate(tickets)]
    check_reached(calls, reached)
    for index in reversed(asked):
        grad = grads.pop(index)
        assert grad is not None
        if calls[index].depth == last and not calls[-1].is_pool:
            check_rows_apart([calls[index]], [grad], start)
        if not tickets[index].visited:
            sweep.take(index, grad, tickets[index].kept, tickets[index].peak)


def _visit(
    sweep: Sweep, index: int, ticket: Ticket, output_grad: Tensor, needs: Needs
) -> tuple[Tensor | None, ...]:
    kept, ticket.kept = ticket.kept, None  # freed as soon as it is reduced
    return sweep.take(index, output_grad, kept, ticket.peak, needs)
