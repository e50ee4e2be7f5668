"""Is a flagged head really idle? Zero it, and as many of its neighbours, and compare."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from gmar_lightning.explain.ablation import ablate_heads
from gmar_lightning.monitor.events import HeadEvent
from gmar_lightning.monitor.explanation import Explanation
from gmar_lightning.monitor.probe import ProbeBatch
from gmar_lightning.monitor.processes import joined, on_every_process, rows_of_process
from gmar_lightning.monitor.settings import ProbeSettings

Heads = list[tuple[int, int]]


def confirm_by_ablation(
    model: nn.Module,
    probe: ProbeBatch,
    explanation: Explanation,
    events: Sequence[HeadEvent],
    flagged: Sequence[tuple[int, int]],
    settings: ProbeSettings,
) -> list[HeadEvent]:
    """Measure what newly collapsed heads still contribute.

    One forward with all of them zeroed and one with as many random unflagged heads of the same layers: two
    forwards over the probe images, however many heads were flagged.

    Args:
        model: The model that was probed, held whole by every process.
        probe: The probe images.
        explanation: What the probe found; its logits are those of the intact model.
        events: What the detector reported.
        flagged: Heads flagged now, `(layer, head)`; no control for the others.
        settings: As the probe was taken.

    Returns:
        The events, collapses with their measured effect and a message that says it.
    """
    collapsed: Heads = [
        (event.layer, event.head)
        for event in events
        if event.kind == "collapsed" and event.layer is not None and event.head is not None
    ]
    if not collapsed:
        return list(events)
    heads = np.isfinite(explanation.importance.mean(0)).sum(-1)
    control = _control(collapsed, set(flagged), heads)
    rows = rows_of_process(len(probe))
    images, logits = probe.images[rows], torch.from_numpy(explanation.logits[rows])
    targets = torch.from_numpy(explanation.targets[rows])

    def effects() -> dict[str, np.ndarray]:
        with settings.precision():
            return {
                name: _effect(model, images, targets, logits, chosen, settings.module)
                for name, chosen in (("flagged", collapsed), ("control", control))
            }

    per_image = joined(on_every_process(effects), len(probe))
    means = np.stack([per_image[name].mean(0) for name in ("flagged", "control")])
    return [
        _annotated(event, means, bool(control)) if event.kind == "collapsed" else event for event in events
    ]


def _control(collapsed: Heads, flagged: set[tuple[int, int]], heads: np.ndarray) -> Heads:
    # Seeded by the question itself: every process asks the same one, and no random stream moves.
    draw = random.Random(repr(collapsed))
    control: Heads = []
    for layer in sorted({layer for layer, _ in collapsed}):
        count = sum(1 for where, _ in collapsed if where == layer)
        healthy = [(layer, head) for head in range(int(heads[layer])) if (layer, head) not in flagged]
        control += draw.sample(healthy, min(count, len(healthy)))
    return control


def _effect(
    model: nn.Module,
    images: torch.Tensor,
    targets: torch.Tensor,
    logits: torch.Tensor,
    heads: Heads,
    module: str | None,
) -> np.ndarray:
    if not heads:
        return np.full((len(images), 2), np.nan)
    result = ablate_heads(model, images, targets, heads=heads, module=module, logits=logits)
    return torch.stack([result.logit_change, result.loss_change], -1).cpu().numpy()


def _annotated(event: HeadEvent, effects: np.ndarray, controlled: bool) -> HeadEvent:
    (logit, loss), (control_logit, control_loss) = effects.tolist()
    said = f" Zeroing the flagged heads changes the logit by {logit:+.3g} and the loss by {loss:+.3g}"
    beside = (
        f"; as many other heads of the layer: {control_logit:+.3g} and {control_loss:+.3g}."
        if controlled
        else "."
    )
    return replace(
        event,
        message=event.message + said + beside,
        ablation_logit=logit,
        ablation_loss=loss,
        control_logit=control_logit if controlled else None,
        control_loss=control_loss if controlled else None,
    )
