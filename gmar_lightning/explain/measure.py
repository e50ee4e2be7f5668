"""One forward and one backward of a batch, and what they show of every attention layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gmar_lightning.explain.attention import AttentionCall, recording
from gmar_lightning.explain.inputs import forward, image_key, logits_of, padding_of
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
    with recording(classifier) as found:
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
        edges: Any = [call.edge for call in found.calls]
        grads = check_reached(found.calls, torch.autograd.grad(scores.sum(), edges, allow_unused=True))
    if not found.calls[-1].is_pool:
        check_rows_apart(*_last_depth(found.calls, grads), start)
    sweep = Sweep(found.calls, start, form, layout, padding)
    for index in reversed(range(len(grads))):
        sweep.take(index, grads.pop())
    return Measured(sweep, layout, padding, logits.detach(), goals, scores.detach())


def _forward(classifier: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """Logits, and the images at the head of their graph."""
    key = image_key(inputs)
    if key is None or not inputs[key].is_floating_point():
        return logits_of(forward(classifier, inputs)), None if key is None else inputs[key]
    # The copy is no leaf, so that a model may normalise its input in place, and never the caller's.
    image = inputs[key].detach().requires_grad_().clone()
    return logits_of(forward(classifier, {**inputs, key: image})), image


def _last_depth(calls: list[AttentionCall], grads: list[Tensor]) -> tuple[list[AttentionCall], list[Tensor]]:
    count = sum(call.depth == calls[-1].depth for call in calls)
    return calls[-count:], grads[-count:]
