"""What the collapse detector reports: events and states, and the sentences that explain them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

EventKind = Literal[
    # from importance
    "collapsed",
    "recovered",
    "dormant",
    "woke",
    "dominance",
    "dominance_end",
    "layer_vanishing",
    "layer_restored",
    "global_shrink",
    "global_restored",
    "nonfinite",
    # from the signals that see what importance cannot
    "entropy_collapse",
    "entropy_restored",
    "uniform_attention",
    "uniform_attention_end",
    "logit_growth",
    "logit_growth_end",
    "attention_sink",
    "attention_sink_end",
    "head_copy",
    "head_copy_end",
    "rank_collapse",
    "rank_restored",
    "constant_values",
    "constant_values_end",
]


@dataclass(frozen=True)
class HeadEvent:
    """Something that happened to a head, to a layer, or to the whole model.

    Attributes:
        step: Step of the probe that decided it.
        kind: What happened, one of `EventKind`; each trouble has a kind that takes it back.
        layer: Index of the layer; None for the whole model.
        head: Index of the head in its layer; None for a layer or the whole model.
        layer_name: Name of the layer; empty for the whole model.
        value: For a head, its share of the layer's importance now, 0 to 1. For a layer or the model, the sum
            of raw importance now. For `nonfinite`, how many entries were not finite. For kinds that a signal
            shows (`entropy_collapse` and those after it), that signal now.
        reference: The same quantity at the highest level that was held for three probes.
        since_step: Step of the first probe at which the condition held.
        message: The event with its numbers, for a person.
        ablation_logit: Mean change of the explained logit when the flagged heads are zeroed, if measured.
        ablation_loss: Mean change of the loss when the flagged heads are zeroed, if measured.
        control_logit: The same for as many random unflagged heads of the layer, if measured.
        control_loss: The same for as many random unflagged heads of the layer, if measured.
        cause: Why, one of `causes.Cause`; None where it was not asked (no signals).
        evidence: The two figures that decided the cause.
        mean_ablation_logit: As `ablation_logit`, with their mean output over the images in their place.
        mean_ablation_loss: As `ablation_loss`, with their mean output over the images in their place.
        gate_logit: This head's own part of `ablation_logit`, by the gradient at its gate in 4 steps.
        ablation_images: How many images all of this was measured on.
    """

    step: int
    kind: EventKind
    layer: int | None
    head: int | None
    layer_name: str
    value: float
    reference: float
    since_step: int
    message: str
    ablation_logit: float | None = None
    ablation_loss: float | None = None
    control_logit: float | None = None
    control_loss: float | None = None
    cause: str | None = None
    evidence: str = ""
    mean_ablation_logit: float | None = None
    mean_ablation_loss: float | None = None
    gate_logit: float | None = None
    ablation_images: int | None = None


@dataclass(frozen=True)
class HeadState:
    """Where one head stands now.

    Attributes:
        status: `warming` (too few probes to judge), `alive`, `collapsed` or `dormant`.
        share: Its share of the layer's importance at the last probe, 0 to 1.
        peak_share: The highest share it held for three probes.
        kept: Raw importance as a fraction of the highest level it held for three probes; NaN before there
            is one.
        since_step: First step of the present `collapsed` or `dormant` episode, else None.
    """

    status: str
    share: float
    peak_share: float
    kept: float
    since_step: int | None


@dataclass(frozen=True)
class ProbeReport:
    """One probe's numbers, and the events made from them; arrays are `(layers, heads)`.

    Attributes:
        step: Step of the probe.
        names: Layer names.
        raw: Raw importance.
        share: Share of the layer's importance.
        peak: Highest raw importance each head held before this probe.
        peak_share: Highest share each head held before this probe.
        heads: Heads of each layer, `(layers, 1)`.
    """

    step: int
    names: Sequence[str]
    raw: np.ndarray
    share: np.ndarray
    peak: np.ndarray
    peak_share: np.ndarray
    heads: np.ndarray

    def head(self, kind: EventKind, layer: int, head: int, since: int) -> HeadEvent:
        """An event of one head."""
        share, reference = float(self.share[layer, head]), float(self.peak_share[layer, head])
        raw, peak = float(self.raw[layer, head]), float(self.peak[layer, head])
        who = f"{self.names[layer]} head {head}"
        kept = f"{percent(raw / peak)} of its peak" if peak > 0 else "zero"
        shares = f"its share of the layer went from {percent(reference)} to {percent(share)}"
        message = {
            "collapsed": f"{who} collapsed: since step {since} {shares} and its gradient is at {kept}.",
            "recovered": f"{who} recovered: since step {since} its share of the layer is back at "
            f"{percent(share)} (peak {percent(reference)}) and its gradient at {kept}.",
            "dormant": f"{who} is dormant: by step {self.step} it has never held more than "
            f"{percent(reference)} of its layer (now {percent(share)}; a fair share is "
            f"{percent(1 / float(self.heads[layer, 0]))}).",
            "woke": f"{who} woke: since step {since} {shares}.",
            "dominance": f"{who} dominates its layer: since step {since} it holds {percent(share)} of the "
            f"layer's importance among {int(self.heads[layer, 0])} heads.",
            "dominance_end": f"{who} no longer dominates its layer: since step {since} it holds "
            f"{percent(share)} of the layer's importance.",
        }[kind]
        return HeadEvent(self.step, kind, layer, head, self.names[layer], share, reference, since, message)

    def layer(self, kind: EventKind, layer: int, best: float, since: int) -> HeadEvent:
        """An event of one layer; `best` is what its best-kept head kept."""
        value, reference = float(self.raw[layer].sum()), float(self.peak[layer].sum())
        name = self.names[layer]
        if reference == 0:
            message = f"{name} carries no gradient: its importance has been zero up to step {self.step}."
        elif kind == "layer_vanishing":
            message = (
                f"{name} is vanishing as a whole: since step {since} its importance fell from {reference:.3g} "
                f"to {value:.3g}, and even its best-kept head is at {percent(best)} of its peak."
            )
        else:
            message = (
                f"{name} is restored: since step {since} its importance is back at {value:.3g} of "
                f"{reference:.3g}."
            )
        return HeadEvent(self.step, kind, layer, None, name, value, reference, since, message)

    def model(self, kind: EventKind, since: int) -> HeadEvent:
        """An event of the whole model."""
        value, reference = float(self.raw.sum()), float(self.peak.sum())
        if kind == "global_shrink":
            message = (
                f"Gradients of nearly all layers shrank: since step {since} the model's total importance fell "
                f"from {reference:.3g} to {value:.3g}; no single head or layer is at fault."
            )
        else:
            message = (
                f"Gradients are restored: since step {since} the model's total importance is back at "
                f"{value:.3g} of {reference:.3g}."
            )
        return HeadEvent(self.step, kind, None, None, "", value, reference, since, message)


def nonfinite_event(step: int, bad: np.ndarray, names: Sequence[str]) -> HeadEvent:
    """The event for entries that are NaN or infinite, `bad` `(layers, heads)` with at least one True."""
    layers, heads = np.nonzero(bad)
    layer = int(layers[0]) if len(set(layers.tolist())) == 1 else None
    head = int(heads[0]) if len(heads) == 1 else None
    if layer is None:
        where = f"{len(heads)} heads in {len(set(layers.tolist()))} layers"
    else:
        where = f"{names[layer]} head {head}" if head is not None else f"{len(heads)} heads of {names[layer]}"
    message = f"Importance of {where} is NaN or infinite at step {step}; this probe was not judged."
    name = names[layer] if layer is not None else ""
    return HeadEvent(step, "nonfinite", layer, head, name, float(len(heads)), 0.0, step, message)


def percent(fraction: float) -> str:
    """A fraction as a person reads it."""
    hundredths = 100 * fraction
    return f"{hundredths:.0f} %" if hundredths >= 9.5 else f"{hundredths:.2g} %"
