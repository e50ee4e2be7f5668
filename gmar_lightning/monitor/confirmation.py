"""Is a flagged head really idle? Take it away, and as many of its neighbours, and compare."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence, Sized
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from gmar_lightning.explain.ablation import Head, ablate_heads, gate_effects, head_outputs
from gmar_lightning.explain.errors import UnsupportedModelError
from gmar_lightning.explain.inputs import named_inputs
from gmar_lightning.explain.nested import rows_of
from gmar_lightning.monitor.events import HeadEvent
from gmar_lightning.monitor.explanation import Explanation
from gmar_lightning.monitor.probe import ProbeBatch
from gmar_lightning.monitor.processes import joined, on_every_process, rows_of_process
from gmar_lightning.monitor.settings import ProbeSettings

Heads = list[Head]

# Beside as many other heads of the layer: below the first nearly idle, above the second as busy as they are.
_IDLE, _BUSY = 0.25, 1.0
_METHODS: tuple[Literal["zero", "mean"], ...] = ("zero", "mean")


def confirm_by_ablation(
    model: nn.Module,
    probe: ProbeBatch,
    explanation: Explanation,
    events: Sequence[HeadEvent],
    flagged: Sequence[tuple[int, int]],
    settings: ProbeSettings,
) -> list[HeadEvent]:
    """Measure what newly collapsed heads still contribute.

    All of them are zeroed, and replaced by their mean over the probe images; so are as many random unflagged
    heads of the same layers. Each flagged head's own part comes from its gate, integrated in 4 steps. That is
    five forwards, and four more with a backward, over the probe images, however many heads were flagged.

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
    if not collapsed or explanation.logits is None or explanation.targets is None:
        return list(events)  # the effect is measured on the logit of a class
    heads = np.isfinite(explanation.importance.mean(0)).sum(-1)
    control = _control(collapsed, set(flagged), heads)
    rows = rows_of_process(len(probe))
    images = named_inputs(probe.part(rows), settings.inputs)
    logits = torch.from_numpy(explanation.logits[rows])
    targets = torch.from_numpy(explanation.targets[rows])

    chosen = {"flagged": collapsed, "control": control}

    def outputs() -> dict[str, np.ndarray]:
        try:
            with settings.precision():
                found = head_outputs(model, images, heads=collapsed + control, module=settings.module)
        except UnsupportedModelError:
            return {}  # heads of windows have no mean over images: they are zeroed only
        return {_key(at): output.float().cpu().numpy() for at, output in found.items()}

    # The mean is over all probe images, whichever process has them.
    together = joined(on_every_process(outputs), len(probe))
    means = {at: torch.from_numpy(together[_key(at)].mean(0)) for at in collapsed + control if together}

    def effects() -> dict[str, np.ndarray]:
        with settings.precision():
            found = {
                f"{method} {name}": _effect(
                    model, images, targets, logits, heads, means, method, settings.module
                )
                for name, heads in chosen.items()
                for method in _METHODS
            }
            gates = (
                _gates(model, images, targets, collapsed, settings) if means else _unknown(rows, collapsed)
            )
            return {**found, "gates": gates}

    per_image = joined(on_every_process(effects), len(probe))
    over_images = {name: values.mean(0) for name, values in per_image.items()}
    gates = dict(zip(collapsed, over_images.pop("gates").tolist(), strict=True))
    return [
        with_effect(event, over_images, gates[event.layer, event.head], len(probe))
        if event.kind == "collapsed" and event.layer is not None and event.head is not None
        else event
        for event in events
    ]


def with_effect(event: HeadEvent, effects: Mapping[str, np.ndarray], gate: float, images: int) -> HeadEvent:
    """The event with what taking its heads away does, in numbers and in words.

    Args:
        event: A collapse.
        effects: `zero flagged`, `mean flagged`, `zero control`, `mean control`: mean change of logit and loss,
            `(2,)` each; NaN where there was no head to compare with.
        gate: The head's own part of the change of the logit.
        images: Images measured on.
    """
    zero, mean = effects["zero flagged"], effects["mean flagged"]
    beside, beside_mean = effects["zero control"], effects["mean control"]
    controlled = bool(np.isfinite(beside).all())
    averaged = bool(np.isfinite(mean).all())
    said = f" Zeroing the flagged heads changes the logit by {zero[0]:+.3g} and the loss by {zero[1]:+.3g} (mean of "
    said += f"{images} images"
    if averaged:
        said += (
            f"; {gate:+.3g} of the logit is this head's), their mean output in their place by {mean[0]:+.3g} "
        )
        said += f"and {mean[1]:+.3g}"
    else:
        said += ")"
    if controlled:
        said += f"; as many other heads of the layer: {beside[0]:+.3g} and {beside[1]:+.3g}"
        said += f", by their mean {beside_mean[0]:+.3g} and {beside_mean[1]:+.3g}" if averaged else ""
    return replace(
        event,
        message=f"{event.message}{said}. {_verdict(zero, mean, beside, beside_mean)}",
        ablation_logit=float(zero[0]),
        ablation_loss=float(zero[1]),
        mean_ablation_logit=float(mean[0]) if averaged else None,
        mean_ablation_loss=float(mean[1]) if averaged else None,
        control_logit=float(beside[0]) if controlled else None,
        control_loss=float(beside[1]) if controlled else None,
        gate_logit=gate if averaged else None,
        ablation_images=images,
    )


def _verdict(zero: np.ndarray, mean: np.ndarray, beside: np.ndarray, beside_mean: np.ndarray) -> str:
    """Does it matter, in a sentence."""
    ways = [(abs(zero[0]), abs(beside[0])), (abs(mean[0]), abs(beside_mean[0]))]
    ratios = [effect / yardstick for effect, yardstick in ways if yardstick > 0 and np.isfinite(effect)]
    if not ratios:
        return "There is no healthy head in the layer to compare with."
    # The larger of the two: neither way of taking a head away may show that it still works.
    ratio = max(ratios)
    if ratio < _IDLE:
        return "It is idle: nothing is lost as it stands, and it is free to prune."
    if ratio < _BUSY:
        return "It does less than its neighbours, but is not idle."
    return "The answer still depends on it: look for the cause before you go on."


def _unknown(images: Sized, columns: Sized) -> np.ndarray:
    return np.full((len(images), len(columns)), np.nan)


def _key(at: Head) -> str:
    return f"{at[0]}.{at[1]}"


def _gates(
    model: nn.Module,
    images: Mapping[str, Any],
    targets: torch.Tensor,
    heads: Heads,
    settings: ProbeSettings,
) -> np.ndarray:
    # With gradients a batch needs as much memory as the probe itself: the same micro-batches.
    count = len(targets)
    size = settings.micro_batch_size or count
    cuts = [slice(start, start + size) for start in range(0, count, size)]
    parts = [
        gate_effects(model, rows_of(images, cut, count), targets[cut], heads=heads, module=settings.module)
        for cut in cuts
    ]
    return torch.cat(parts).numpy()


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
    images: Mapping[str, Any],
    targets: torch.Tensor,
    logits: torch.Tensor,
    heads: Heads,
    means: Mapping[Head, torch.Tensor],
    method: Literal["zero", "mean"],
    module: str | None,
) -> np.ndarray:
    if not heads or (method == "mean" and not means):
        return _unknown(targets, range(2))
    result = ablate_heads(
        model, images, targets, heads=heads, module=module, logits=logits, method=method, means=means
    )
    return torch.stack([result.logit_change, result.loss_change], -1).cpu().numpy()
