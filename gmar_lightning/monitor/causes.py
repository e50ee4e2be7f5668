"""Why a head, a layer or a model lost its importance, with the two figures that decided.

A head's importance is the norm of `dO V^T`: it falls because the values fell, because the gradient of the
head's output fell, or because the head's attention became such that what it passes on no longer matters.
Every figure is what is left now of the highest level that was held, relative to what the other heads and
layers kept, so that a model that shrinks as a whole blames no head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from gmar_lightning.monitor.events import HeadEvent, percent

Cause = Literal[
    "switched off by its values",
    "switched off by its output projection",
    "no-op sink",
    "saturated",
    "uniform",
    "no gradient reaches the layer",
    "images cancel",
    "LayerScale at zero",
    "the model became confident",
    "the learning rate decayed",
    "the layer died",
    "unknown",
]

ADVICE: dict[str, str] = {
    "switched off by its values": "its values are near zero: look for weight decay or a frozen value projection",
    "switched off by its output projection": "the output projection ignores it: it is free to prune",
    "no-op sink": "it rests on a token that carries nothing; harmless unless many heads do, then add registers",
    "saturated": "its softmax is one-hot and passes no gradient: lower the learning rate or use QK-norm",
    "uniform": "it averages all tokens: look for queries or keys driven to zero",
    "no gradient reaches the layer": "something after it detaches or blocks the gradient: look there first",
    "images cancel": "it pushes single images in opposite directions: look at the images one by one",
    "LayerScale at zero": "its branch is scaled away (by LayerScale or the output projection): reset it",
    "the model became confident": "the explained class is nearly certain: nothing to repair",
    "the learning rate decayed": "training is coming to rest: nothing to repair",
    "the layer died": "values of all heads are near zero: look for too strong weight decay or too high a rate",
    "unknown": "no signal decides; ablate it before you act",
}

# Importance fell below a quarter and is about the product of two figures: one of them fell below a half.
_FELL = 0.5
_LAYER_FELL = 0.3  # of what the other layers kept, as the rule for a vanishing layer


@dataclass(frozen=True)
class Evidence:
    """Quantities now and as they were held, `(layers, heads)` each.

    Attributes:
        now: By name, as `margins` gives them.
        held: The highest level held of each; NaN where there is none.
        sink_value: Value norm of the most attended token against the others; None if not known.
        context: `doubt` (one minus the probability of the class) and `learning_rate`, those that are known.
        context_held: The highest held level of each.
    """

    now: Mapping[str, np.ndarray]
    held: Mapping[str, np.ndarray]
    sink_value: np.ndarray | None = None
    context: Mapping[str, float] = field(default_factory=dict)
    context_held: Mapping[str, float] = field(default_factory=dict)

    def kept(self, name: str) -> np.ndarray | None:
        """What is left of a quantity; NaN where there is nothing to compare with; None if it is not known."""
        if name not in self.now:
            return None
        with np.errstate(invalid="ignore", divide="ignore"):
            return self.now[name] / self.held[name]

    def best_kept(self, name: str) -> np.ndarray | None:
        """What the best-kept head of each layer kept, `(layers,)`."""
        kept = self.kept(name)
        if kept is None:
            return None
        best = np.where(np.isfinite(kept), kept, -np.inf).max(axis=1)
        return np.where(np.isfinite(best), best, np.nan)


def margins(signals: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Distance of each head from each degenerate state, and the norms that tell why a head collapsed.

    Args:
        signals: Signals by name, `(layers, heads)` each.

    Returns:
        Not negative, `(layers, heads)` each, those whose signal is there; NaN where a signal is not finite.
    """
    found: dict[str, np.ndarray] = {}

    def put(name: str, signal: str, margin: Any) -> None:
        if signal in signals:
            values = np.where(np.isfinite(signals[signal]), signals[signal], np.nan)
            found[name] = np.maximum(margin(values), 0.0)

    put("spread", "entropy", lambda entropy: entropy)
    put("focus", "entropy", lambda entropy: 1 - entropy)
    # A softmax does not notice logits below 1: growth counts from there.
    put("calm", "logit_max", lambda logit: 1 / np.maximum(logit, 1.0))
    put("outside sink", "sink_mass", lambda mass: 1 - mass)
    put("difference", "similarity", lambda cosine: 1 - cosine)
    put("token difference", "token_similarity", lambda cosine: 1 - cosine)
    put("value difference", "value_similarity", lambda cosine: 1 - cosine)
    for name in ("value_norm", "gradient_norm", "output_norm", "agreement", "layer_scale"):
        put(name, name, lambda norm: norm)
    if "agreement" not in found and {"contribution", "contribution_signed"} <= signals.keys():
        # The signed mean over images beside the mean of sizes: 1 where all images pull the same way.
        size = signals["contribution"]
        with np.errstate(invalid="ignore", divide="ignore"):
            found["agreement"] = np.where(size > 0, np.abs(signals["contribution_signed"]) / size, np.nan)
    return found


def with_causes(events: Sequence[HeadEvent], seen: Evidence) -> list[HeadEvent]:
    """The events, with cause, evidence and advice where a signal can tell."""
    if not (seen.now or seen.context):
        return list(events)
    return [_with_cause(event, seen) for event in events]


def _with_cause(event: HeadEvent, seen: Evidence) -> HeadEvent:
    if event.kind == "collapsed" and event.layer is not None and event.head is not None:
        cause, evidence = cause_of_collapse(seen, event.layer, event.head)
    elif event.kind == "layer_vanishing" and event.layer is not None:
        cause, evidence = cause_of_vanishing(seen, event.layer)
    elif event.kind == "global_shrink":
        cause, evidence = cause_of_shrink(seen)
    else:
        return event
    because = f" Cause: {cause} ({evidence}); {ADVICE[cause]}." if evidence else f" Cause: {cause}."
    return replace(event, cause=cause, evidence=evidence, message=event.message + because)


def cause_of_collapse(seen: Evidence, layer: int, head: int) -> tuple[Cause, str]:
    """Why one head collapsed.

    Args:
        seen: Quantities now and as they were held.
        layer: Its layer.
        head: Its index there.

    Returns:
        The cause, and the figures that decided.
    """
    at = (layer, head)
    if _others_in_layer_lost(seen, layer, head):
        return _cause_in_layer(seen, layer)
    degenerate = _degenerate(seen, at)
    if degenerate is not None:
        return degenerate
    values, gradient = _relative(seen, "value_norm", at), _relative(seen, "gradient_norm", at)
    figures = f"value norm at {_left(values)}, gradient at its output at {_left(gradient)}"
    # a comparison with NaN, a signal that is missing, is false
    if values < _FELL and not gradient <= values:
        return "switched off by its values", figures
    if gradient < _FELL:
        return "switched off by its output projection", figures
    agreement = _relative(seen, "agreement", at)
    if agreement < _FELL / 2:
        return (
            "images cancel",
            f"agreement of the images at {_left(agreement)}, gradient at {_left(gradient)}",
        )
    return "unknown", figures if math.isfinite(values) or math.isfinite(gradient) else ""


def cause_of_vanishing(seen: Evidence, layer: int) -> tuple[Cause, str]:
    """Why a whole layer vanished beside the others."""
    cause, evidence = _cause_in_layer(seen, layer)
    if cause == "unknown":
        around = _from_context(seen)
        return around if around is not None else (cause, evidence)
    return cause, evidence


def cause_of_shrink(seen: Evidence) -> tuple[Cause, str]:
    """Why the importance of nearly all layers fell."""
    values, gradient = _median(seen.best_kept("value_norm")), _median(seen.best_kept("gradient_norm"))
    figures = f"value norms at {_left(values)}, gradients at {_left(gradient)}"
    if values < _LAYER_FELL and not gradient < values:
        return "the layer died", figures
    if gradient < 1e-6:
        # Not small but absent: no confident model and no decayed rate makes it exactly nothing.
        return "no gradient reaches the layer", figures
    around = _from_context(seen)
    if around is not None:
        return around
    return "unknown", figures if math.isfinite(values) or math.isfinite(gradient) else ""


def _degenerate(seen: Evidence, at: tuple[int, int]) -> tuple[Cause, str] | None:
    """A cause in the attention map, if it changed to a degenerate one."""
    outside, spread, focus = (_lost(seen, name, at) for name in ("outside sink", "spread", "focus"))
    sink = float(seen.sink_value[at]) if seen.sink_value is not None else math.nan
    if outside.now < 0.2 and outside.kept < 0.3 and sink < 0.3:
        return (
            "no-op sink",
            f"{percent(1 - outside.now)} of attention on one token of {_left(sink, 'value norm')}",
        )
    if spread.now < 0.15 and spread.kept < 0.3:
        return "saturated", f"entropy {spread.now:.3f}, at {_left(spread.kept)} of its reference"
    if focus.now < 0.01 and focus.kept < 0.05 and focus.held > 0.002:
        return "uniform", f"entropy {1 - focus.now:.4f}, was {1 - focus.held:.3f}"
    return None


def _cause_in_layer(seen: Evidence, layer: int) -> tuple[Cause, str]:
    gradients, values = seen.best_kept("gradient_norm"), seen.best_kept("value_norm")
    gradient = _beside(gradients, layer)
    value = _beside(values, layer)
    figures = f"gradient at the layer's heads at {_left(gradient)}, value norms at {_left(value)}"
    if value < _LAYER_FELL and not gradient < value:
        return "switched off by its values", figures
    if not gradient < _LAYER_FELL or gradients is None:
        return "unknown", figures if math.isfinite(gradient) or math.isfinite(value) else ""
    scales = seen.kept("layer_scale")
    scale = (
        float(np.nanmin(scales[layer]))
        if scales is not None and np.isfinite(scales[layer]).any()
        else math.nan
    )
    if scale < _LAYER_FELL:
        return (
            "LayerScale at zero",
            f"LayerScale at {_left(scale)}, gradient at the heads at {_left(gradient)}",
        )
    before, after = _median(gradients[:layer]), _median(gradients[layer + 1 :])
    # What blocks the gradient on the residual path starves all layers before it; what scales one branch
    # away starves only that branch.
    if before < _LAYER_FELL * (after if math.isfinite(after) else 1.0):
        return (
            "no gradient reaches the layer",
            f"gradient at {_left(gradient)}, in the layers before at {_left(before)}",
        )
    around = (
        f"gradient at {_left(gradient)}, in the layers around it at {_left(np.nanmax([before, after, 0.0]))}"
    )
    if math.isfinite(scale):
        return "switched off by its output projection", f"{around}, LayerScale at {_left(scale)}"
    return "LayerScale at zero", around


def _others_in_layer_lost(seen: Evidence, layer: int, head: int) -> bool:
    """Whether the other heads of the layer lost their gradient as well."""
    kept = seen.kept("gradient_norm")
    if kept is None or kept.shape[1] < 2:
        return False
    others = np.delete(kept[layer], head)
    others = others[np.isfinite(others)]
    if not len(others):
        return False
    best = seen.best_kept("gradient_norm")
    assert best is not None
    best[layer] = others.max()
    return bool(_beside(best, layer) < _LAYER_FELL)


@dataclass(frozen=True)
class _Lost:
    now: float
    held: float

    @property
    def kept(self) -> float:
        return self.now / self.held if self.held > 0 else math.nan


def _lost(seen: Evidence, name: str, at: tuple[int, int]) -> _Lost:
    if name not in seen.now:
        return _Lost(math.nan, math.nan)
    return _Lost(float(seen.now[name][at]), float(seen.held[name][at]))


def _relative(seen: Evidence, name: str, at: tuple[int, int]) -> float:
    """What a head kept of a quantity, beside the best-kept other head of its layer."""
    kept = seen.kept(name)
    if kept is None:
        return math.nan
    others = np.delete(kept[at[0]], at[1])
    others = others[np.isfinite(others)]
    best = min(1.0, float(others.max())) if len(others) else 1.0
    return float(kept[at]) / max(best, 1e-12)


def _beside(best: np.ndarray | None, layer: int) -> float:
    """What a layer kept, beside the best-kept of the other layers: most of them may be starved as well."""
    if best is None:
        return math.nan
    others = np.delete(best, layer)
    others = others[np.isfinite(others)]
    return float(best[layer]) / max(min(1.0, float(others.max()) if len(others) else 1.0), 1e-12)


def _from_context(seen: Evidence) -> tuple[Cause, str] | None:
    doubt, doubted = seen.context.get("doubt", math.nan), seen.context_held.get("doubt", math.nan)
    rate, highest = (
        seen.context.get("learning_rate", math.nan),
        seen.context_held.get("learning_rate", math.nan),
    )
    left = rate / highest if highest > 0 else math.nan
    figures = f"probability of the class {1 - doubt:.3f}, learning rate at {_left(left)}"
    if doubt < 0.1 and doubt < 0.5 * doubted:
        return "the model became confident", figures
    if rate < 0.25 * highest:
        return "the learning rate decayed", figures
    return None


def _median(values: np.ndarray | None) -> float:
    if values is None or not np.isfinite(values).any():
        return math.nan
    return float(np.nanmedian(values))


def _left(fraction: float, of: str = "") -> str:
    """A fraction as a person reads it, or that it is not known."""
    known = percent(fraction) if math.isfinite(fraction) else "an unknown level"
    return f"{known} {of}".strip()
