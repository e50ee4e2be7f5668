"""Which attention heads die while a model trains, and which only look as if they did.

The rule, in three sentences. A head is flagged when, for `patience` probes running, it is left with less
than `drop` of the gradient it once held *and* with next to nothing beside its layer: less than `floor` of
what the median head there once held, or than `overshadowed` of what the strongest head there holds now.
What it once held is scaled by what the best-kept head of its layer and the other layers kept, and lowered by
what it lost in the very probe in which a neighbour exploded, so a vanishing layer, a confident model whose
gradients all fade, or an exploding neighbour never makes a head look dead. A head that never came alive is
reported once, as dormant, and every flag is taken back when the head returns.
"""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from gmar_lightning.explain.importance import head_shares
from gmar_lightning.monitor.attention_rules import AttentionRules
from gmar_lightning.monitor.causes import with_causes
from gmar_lightning.monitor.events import EventKind, HeadEvent, HeadState, ProbeReport, nonfinite_event
from gmar_lightning.monitor.latch import HOLD, HeadMemory, Latch, most, most_of_the_others

_TINY = 1e-9  # keeps a quotient finite; smaller than any fraction that is compared


class CollapseDetector:
    """Streaming detector of head collapse from raw head importance; the rule is in the module's docstring.

    A probe costs O(layers x heads) time and memory, whatever came before. The first probe is never used as a
    reference, because a model at initialisation is not typical of itself.

    Args:
        floor: Near nothing: the fraction of a fair share (what the median head of the layer once held) below
            which a head can be called collapsed or dormant. Up to doubled for a head that lost far more than
            `drop` asks, so that a once strong head need not fall further than the others.
        drop: The fraction of its own peak below which a head can be called collapsed.
        overshadowed: Near nothing as well: the fraction of what the strongest head of the layer holds now.
            It finds heads that die together, when the survivor takes over their work.
        patience: Probes in a row that must agree before anything is raised.
        clear_after: Probes in a row that must agree before anything raised is taken back.
        hysteresis: A head has recovered, or woken, once it is above its thresholds times this.
        warmup: Probes of a head before anything can be raised about it.
        dormant_after: A head whose share has not once been held above `floor` by this many probes is
            dormant.
        dominance: The share of its layer above which one head is said to dominate it; it ends at three
            quarters of that. Only in layers of three heads or more.
        vanished: A layer has vanished when even its best-kept head is left with less than this fraction of
            its peak, relative to the other layers.
        shrunk: The whole model has shrunk when this is all that the best-kept heads of nearly all layers
            are left with.

    Raises:
        ValueError: An argument is out of its range.
    """

    def __init__(
        self,
        *,
        floor: float = 0.15,
        drop: float = 0.25,
        overshadowed: float = 0.06,
        patience: int = 3,
        clear_after: int = 3,
        hysteresis: float = 2.0,
        warmup: int = 5,
        dormant_after: int = 10,
        dominance: float = 0.7,
        vanished: float = 0.3,
        shrunk: float = 0.2,
    ) -> None:
        fractions = {"floor": floor, "drop": drop, "overshadowed": overshadowed}
        fractions |= {"dominance": dominance, "vanished": vanished, "shrunk": shrunk}
        for name, value in fractions.items():
            if not 0 < value < 1:
                raise ValueError(f"{name} must lie between 0 and 1, got {value}")
        if patience < 1 or clear_after < 1:
            raise ValueError(f"patience and clear_after must be at least 1, got {patience} and {clear_after}")
        if hysteresis < 1:
            raise ValueError(f"hysteresis must be at least 1, got {hysteresis}")
        if not HOLD < warmup <= dormant_after:
            raise ValueError(f"need {HOLD} < warmup <= dormant_after, got {warmup} and {dormant_after}")
        self.floor, self.drop, self.overshadowed = floor, drop, overshadowed
        self.dominance, self.vanished, self.shrunk = dominance, vanished, shrunk
        self.patience, self.clear_after, self.hysteresis = patience, clear_after, hysteresis
        self.warmup, self.dormant_after = warmup, dormant_after
        self._names: list[str] = []
        self._last_step: int | None = None
        self._begin((0, 0))

    def update(
        self,
        step: int,
        importance: torch.Tensor | np.ndarray,
        layers: Sequence[str] | None = None,
        signals: Mapping[str, torch.Tensor | np.ndarray] | None = None,
        context: Mapping[str, float] | None = None,
    ) -> list[HeadEvent]:
        """Judge one more probe.

        A second probe of the same step is the same model again: it is ignored. A smaller step means that
        training went back to an earlier point: what was being counted starts over, references and raised
        flags stay.

        Args:
            step: Where training stands; any integer that grows.
            importance: Raw head importance averaged over the probe images, `(layers, heads)`, not
                negative. Layers with fewer heads are padded at the end with NaN.
            layers: Names of the layers for messages; `layer 0`, `layer 1`, ... without.
            signals: Other signals per head by name, `(layers, heads)` each, mean over the probe images.
                They tell why a head collapsed and find what importance cannot see; a signal that is
                missing, or NaN, only leaves out the rules that need it.
            context: `probability`, the mean probability of the explained class, and `learning_rate`: with
                them a shrinking model can be told from a confident one or from one that hardly learns.

        Returns:
            What was decided at this probe, the whole model first, then layers, then heads. If any entry is
            NaN or infinite, a single `nonfinite` event, and the detector is as if never called.

        Raises:
            ValueError: The shape is not `(layers, heads)`, changed since the last call, does not fit
                `layers`, or an entry is negative.
        """
        step = operator.index(step)
        present = None if self._last_step is None else self._memory.present
        raw = _as_array(importance, "importance", None if present is None else present.shape)
        names = _checked_names(raw, layers, self._names)
        others = {name: _as_array(value, name, raw.shape) for name, value in (signals or {}).items()}
        bad = _nonfinite(raw, present)
        if bad.any():
            return [nonfinite_event(step, bad, names)]
        if np.nanmin(raw) < 0:
            raise ValueError(f"importance is a norm and cannot be negative, got {np.nanmin(raw):.3g}")
        if present is None:
            self._begin(raw.shape)
        self._names = names
        if self._last_step is not None and step <= self._last_step:
            if step == self._last_step:
                return []
            for latch in self._latches().values():
                latch.restart()
            self._rules.restart()
        self._last_step = step
        self._memory.present |= np.isfinite(raw)
        events = self._judge(step, np.where(self._memory.present, raw, 0.0))
        events += self._rules.judge(step, names, others, self._collapsed.active | self._dormant.active)
        events = with_causes(events, self._rules.evidence(others, context))
        self._rules.take_in(others, context)
        # the whole model first, then layers, then heads
        return sorted(events, key=lambda event: (event.layer is not None) + (event.head is not None))

    @property
    def states(self) -> list[list[HeadState]]:
        """State of each head now, as `states[layer][head]`; empty before the first probe."""
        return [
            [self._state_of(layer, int(head)) for head in np.flatnonzero(present)]
            for layer, present in enumerate(self._memory.present)
        ]

    @property
    def flagged(self) -> list[tuple[int, int]]:
        """The `(layer, head)` pairs that are collapsed now."""
        return [(int(layer), int(head)) for layer, head in np.argwhere(self._collapsed.active)]

    def state_dict(self) -> dict[str, Any]:
        """Everything remembered, as plain lists, numbers and strings; the arguments are not part of it."""
        return {
            "last_step": self._last_step,
            "names": list(self._names),
            "shape": list(self._memory.present.shape),
            **self._memory.state_dict(),
            **{name: latch.state_dict() for name, latch in self._latches().items()},
            "rules": self._rules.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`.

        Raises:
            ValueError: The state is not one of this detector's.
        """
        try:
            layers, heads = state["shape"]
            fresh = copy.copy(self)
            fresh._begin((layers, heads))
            fresh._names, fresh._last_step = list(state["names"]), state["last_step"]
            fresh._memory.load_state_dict(state)
            for name, latch in fresh._latches().items():
                latch.load_state_dict(state[name])
            # a state written before there were signals has none
            fresh._rules.load_state_dict(state.get("rules", {}))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not a state of a CollapseDetector: {error!r}") from error
        # nothing is taken over unless all of it fits
        self.__dict__.update(fresh.__dict__)

    def _begin(self, shape: tuple[int, ...]) -> None:
        layers = shape[:1]
        self._memory = HeadMemory(shape)
        self._collapsed = Latch(shape, self.patience, self.clear_after)
        self._dormant = Latch(shape, 1, self.clear_after)
        self._dominant = Latch(shape, self.patience, self.clear_after)
        self._vanished = Latch(layers, self.patience, self.clear_after)
        self._shrunk = Latch((), self.patience, self.clear_after)
        self._rules = AttentionRules(shape, self.patience, self.clear_after, self.hysteresis, self.warmup)

    def _latches(self) -> dict[str, Latch]:
        names = ("collapsed", "dormant", "dominant", "vanished", "shrunk")
        return {name: getattr(self, f"_{name}") for name in names}

    def _judge(self, step: int, raw: np.ndarray) -> list[HeadEvent]:
        memory, share = self._memory, head_shares(torch.from_numpy(raw)).numpy()
        memory.excuse_what_fell_by_an_explosion(raw, share)
        kept = memory.kept(raw, self.warmup)
        top = memory.best_kept(kept, self.dormant_after, self._dormant.active)
        others = most_of_the_others(top)
        heads = memory.present.sum(axis=1)[:, None]
        report = ProbeReport(step, self._names, raw, share, memory.raw.value, memory.share.value, heads)
        events = self._judge_model(report, top)
        events += self._judge_layers(report, top, others)
        events += self._judge_heads(report, kept, np.minimum(top, others)[:, None])
        events += self._judge_dominance(report)
        memory.take_in(raw, share, self._dormant.active)
        return events

    def _judge_model(self, report: ProbeReport, top: np.ndarray) -> list[HeadEvent]:
        level = np.asarray(most(np.sort(top)))
        limit = self.shrunk
        raised, cleared = self._shrunk.update(report.step, level < limit, level >= self.hysteresis * limit)
        if not (raised or cleared):
            return []
        return [report.model("global_shrink" if raised else "global_restored", int(self._shrunk.since))]

    def _judge_layers(self, report: ProbeReport, top: np.ndarray, others: np.ndarray) -> list[HeadEvent]:
        # A layer alone has nothing to vanish beside: there, the layer is the model.
        limit = self.vanished * others * (len(top) > 1)
        raised, cleared = self._vanished.update(report.step, top < limit, top >= self.hysteresis * limit)
        return [
            report.layer("layer_vanishing" if raised[layer] else "layer_restored", layer, top[layer], since)
            for layer, since in _where(raised | cleared, self._vanished)
        ]

    def _judge_heads(self, report: ProbeReport, kept: np.ndarray, scale: np.ndarray) -> list[HeadEvent]:
        memory = self._memory
        living = memory.present & ~self._dormant.active
        # what it once held, as if it had shrunk with its layer and with the other layers
        fair = memory.typical(memory.raw.value, self._dormant.active) * scale
        of_fair = np.divide(report.raw, fair, out=np.ones_like(report.raw), where=fair > 0)
        left = np.divide(kept, scale, out=np.ones_like(kept), where=np.isfinite(kept) & (scale > 0))
        # a once strong head that lost far more than asked need not fall further than the others
        floor = self.floor * np.clip(self.drop / np.maximum(left, _TINY), 1, 2)
        strongest = report.raw.max(axis=1, keepdims=True)

        def dead(slack: float) -> np.ndarray:
            left_with_little = left < self.drop * slack
            next_to_nothing = of_fair < floor * slack
            overshadowed = report.raw < self.overshadowed * strongest * slack
            return left_with_little & (next_to_nothing | overshadowed)

        grown = (report.raw >= self.hysteresis * memory.low) & (report.raw > 0)
        returned = ~dead(self.hysteresis) & (left >= self.drop) & grown
        collapsed, recovered = self._collapsed.update(report.step, living & dead(1.0), returned)

        awake = (of_fair >= self.hysteresis * self.floor) & grown
        dormant, woke = self._dormant.update(report.step, self._never_came_alive(report), awake)
        memory.low = np.where(collapsed | dormant, report.raw, memory.low)

        events: list[HeadEvent] = []
        kinds: tuple[tuple[EventKind, np.ndarray, Latch], ...] = (
            ("collapsed", collapsed, self._collapsed),
            ("recovered", recovered, self._collapsed),
            ("dormant", dormant, self._dormant),
            ("woke", woke, self._dormant),
        )
        for kind, mask, latch in kinds:
            events += [report.head(kind, layer, head, since) for layer, head, since in _where(mask, latch)]
        return events

    def _never_came_alive(self, report: ProbeReport) -> np.ndarray:
        """Heads that, now that they are old enough, have never come alive; not in a layer that is all zero."""
        of_age = self._memory.present & (self._memory.age + 1 == self.dormant_after) & ~self._collapsed.active
        never = self._memory.share.value * report.heads < self.floor
        return of_age & never & (report.raw.sum(axis=1, keepdims=True) > 0)

    def _judge_dominance(self, report: ProbeReport) -> list[HeadEvent]:
        judged = self._memory.present & (self._memory.age >= self.warmup) & (report.heads >= 3)
        on = judged & (report.share > self.dominance)
        raised, cleared = self._dominant.update(report.step, on, report.share < 0.75 * self.dominance)
        return [
            report.head("dominance" if raised[layer, head] else "dominance_end", layer, head, since)
            for layer, head, since in _where(raised | cleared, self._dominant)
        ]

    def _state_of(self, layer: int, head: int) -> HeadState:
        at = (layer, head)
        status, since = "alive", None
        if self._collapsed.active[at]:
            status, since = "collapsed", int(self._collapsed.since[at])
        elif self._dormant.active[at]:
            status, since = "dormant", int(self._dormant.since[at])
        elif self._memory.age[at] < self.warmup:
            status = "warming"
        peak = float(self._memory.raw.value[at])
        kept = float(self._memory.raw.last[at]) / peak if peak > 0 else math.nan
        return HeadState(
            status, float(self._memory.share.last[at]), float(self._memory.share.value[at]), kept, since
        )


def _where(mask: np.ndarray, latch: Latch) -> Iterator[tuple[int, ...]]:
    """Index and first step of each entry of a mask."""
    for at in np.argwhere(mask):
        index = tuple(int(i) for i in at)
        yield *index, int(latch.since[index])


def _as_array(values: torch.Tensor | np.ndarray, name: str, shape: tuple[int, ...] | None) -> np.ndarray:
    """A float64 copy of `(layers, heads)`; raises ValueError for another shape, or not `shape` if given."""
    if isinstance(values, torch.Tensor):
        values = values.detach().to("cpu", torch.float64).numpy()
    array = np.array(values, dtype=np.float64)
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"{name} must have shape (layers, heads), got {array.shape}")
    if shape is not None and array.shape != shape:
        raise ValueError(f"{name} changed shape from {shape} to {array.shape}")
    return array


def _checked_names(raw: np.ndarray, layers: Sequence[str] | None, before: list[str]) -> list[str]:
    """One name for each layer; those known before, or made up, where none are given."""
    if layers is None:
        return before or [f"layer {layer}" for layer in range(len(raw))]
    if len(layers) != len(raw):
        raise ValueError(f"{len(layers)} layer names for importance of shape {raw.shape}")
    return [str(name) for name in layers]


def _nonfinite(raw: np.ndarray, present: np.ndarray | None) -> np.ndarray:
    """Entries that should be numbers and are not: NaN is padding only where no head was ever seen."""
    finite = np.isfinite(raw)
    if present is None:
        # the first probe: padding stands behind the last number of a layer
        present = np.flip(np.logical_or.accumulate(np.flip(finite, 1), axis=1), 1)
        present = present | ~finite.any(axis=1, keepdims=True)
    return (present & ~finite) | np.isinf(raw)
