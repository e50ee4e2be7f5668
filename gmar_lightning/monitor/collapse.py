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

from gmar_lightning.monitor.events import EventKind, HeadEvent, HeadState, ProbeReport, nonfinite_event
from gmar_lightning.monitor.latch import HOLD, HeldPeak, Latch, restored
from gmar_lightning.monitor.levels import lower_median, most, most_of_the_others, shares
from gmar_lightning.monitor.reading import as_array, checked_names, nonfinite

_HABIT = 5.0  # times the median head: more than that is an explosion, and its end is no loss
_BURST = 3.0  # times its own peak: a head that jumps this far at once has exploded


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
        fractions = {
            "floor": floor,
            "drop": drop,
            "overshadowed": overshadowed,
            "dominance": dominance,
            "vanished": vanished,
            "shrunk": shrunk,
        }
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
        self, step: int, importance: torch.Tensor | np.ndarray, layers: Sequence[str] | None = None
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

        Returns:
            What was decided at this probe, the whole model first, then layers, then heads. If any entry is
            NaN or infinite, a single `nonfinite` event, and the detector is as if never called.

        Raises:
            ValueError: The shape is not `(layers, heads)`, changed since the last call, does not fit
                `layers`, or an entry is negative.
        """
        step = operator.index(step)
        started = self._last_step is not None
        raw = as_array(importance, self._present.shape if started else None)
        names = checked_names(raw, layers, self._names)
        bad = nonfinite(raw, self._present if started else None)
        if bad.any():
            return [nonfinite_event(step, bad, names)]
        if np.nanmin(raw) < 0:
            raise ValueError(f"importance is a norm and cannot be negative, got {np.nanmin(raw):.3g}")
        if not started:
            self._begin(raw.shape)
        self._names = names
        if self._last_step is not None and step <= self._last_step:
            if step == self._last_step:
                return []
            for latch in self._latches().values():
                latch.restart()
        self._last_step = step
        self._present |= np.isfinite(raw)
        return self._judge(step, np.where(self._present, raw, 0.0))

    @property
    def states(self) -> list[list[HeadState]]:
        """State of each head now, as `states[layer][head]`; empty before the first probe."""
        return [
            [self._state_of(layer, int(head)) for head in np.flatnonzero(present)]
            for layer, present in enumerate(self._present)
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
            "shape": list(self._present.shape),
            "present": self._present.tolist(),
            "age": self._age.tolist(),
            "low": self._low.tolist(),
            "raw": self._raw.state_dict(),
            "share": self._share.state_dict(),
            **{name: latch.state_dict() for name, latch in self._latches().items()},
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
            for name in ("_present", "_age", "_low"):
                setattr(fresh, name, restored(state[name[1:]], getattr(fresh, name)))
            for name, part in {"raw": fresh._raw, "share": fresh._share, **fresh._latches()}.items():
                part.load_state_dict(state[name])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not a state of a CollapseDetector: {error!r}") from error
        # nothing is taken over unless all of it fits
        self.__dict__.update(fresh.__dict__)

    def _begin(self, shape: tuple[int, ...]) -> None:
        layers = shape[:1]
        self._present = np.zeros(shape, dtype=bool)
        self._age = np.zeros(shape, dtype=np.int64)
        self._low = np.zeros(shape)  # raw importance when the head was called collapsed or dormant
        self._raw, self._share = HeldPeak(shape), HeldPeak(shape)
        self._collapsed = Latch(shape, self.patience, self.clear_after)
        self._dormant = Latch(shape, 1, self.clear_after)
        self._dominant = Latch(shape, self.patience, self.clear_after)
        self._vanished = Latch(layers, self.patience, self.clear_after)
        self._shrunk = Latch((), self.patience, self.clear_after)

    def _latches(self) -> dict[str, Latch]:
        return {
            "collapsed": self._collapsed,
            "dormant": self._dormant,
            "dominant": self._dominant,
            "vanished": self._vanished,
            "shrunk": self._shrunk,
        }

    def _judge(self, step: int, raw: np.ndarray) -> list[HeadEvent]:
        share = shares(raw)
        self._rebase(raw, share)
        kept = self._kept(raw)
        top = self._best_kept(kept)
        others = most_of_the_others(top)
        report = ProbeReport(
            step,
            self._names,
            raw,
            share,
            self._raw.value,
            self._share.value,
            self._present.sum(axis=1)[:, None],
        )
        events = self._judge_model(report, top)
        events += self._judge_layers(report, top, others)
        events += self._judge_heads(report, kept, np.minimum(top, others)[:, None])
        events += self._judge_dominance(report)
        # The first probe is no reference: a model at initialisation is not typical of itself.
        seen = self._age > 0
        exploded = (self._raw.value > 0) & (raw > _HABIT * self._typical(raw))
        self._raw.update(np.where(seen, raw, 0.0), ~exploded)
        self._share.update(np.where(seen, share, 0.0), seen)
        self._age = self._age + self._present
        return events

    def _rebase(self, raw: np.ndarray, share: np.ndarray) -> None:
        """What fell in the same probe in which a neighbour exploded fell because of it: not a loss of its own."""
        peak, last = self._raw.value, self._raw.last
        burst = (peak > 0) & (raw > _BURST * peak) & (raw > 2 * last) & (share > 0.5) & (share < 1)
        if not burst.any():
            return
        fell = np.divide(raw, last, out=np.ones_like(raw), where=(last > 0) & ~burst)
        self._raw.value = self._raw.value * np.minimum(fell, 1.0)

    def _typical(self, values: np.ndarray) -> np.ndarray:
        """The median living head of each layer, `(layers, 1)`."""
        living = (self._raw.value > 0) & ~self._dormant.active
        return lower_median(np.where(living, values, np.nan))

    def _kept(self, raw: np.ndarray) -> np.ndarray:
        """What each head kept of its peak; NaN where there is nothing to compare with."""
        judged = self._present & (self._age >= self.warmup) & (self._raw.value > 0)
        return np.divide(raw, self._raw.value, out=np.full(raw.shape, np.nan), where=judged)

    def _best_kept(self, kept: np.ndarray) -> np.ndarray:
        """What the best-kept living head of each layer kept, at most 1; `(layers,)`."""
        living = np.isfinite(kept) & ~self._dormant.active
        top = np.where(living, kept, 0.0).max(axis=1, initial=0.0)
        # A layer that never carried any gradient has kept nothing; one that cannot be judged yet, everything.
        of_age = self._present & (self._age + 1 >= self.dormant_after)
        silent = (self._raw.value.max(axis=1, initial=0.0) == 0) & of_age.any(axis=1)
        return np.where(living.any(axis=1), np.minimum(top, 1.0), np.where(silent, 0.0, 1.0))

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
        living = self._present & ~self._dormant.active
        fair = self._typical(self._raw.value) * scale
        left = np.divide(report.raw, fair, out=np.ones_like(report.raw), where=fair > 0)
        lost = np.divide(kept, scale, out=np.ones_like(kept), where=np.isfinite(kept) & (scale > 0))
        floor = self.floor * np.clip(self.drop / np.maximum(lost, 1e-9), 1, 2)
        shadow = self.overshadowed * report.raw.max(axis=1, keepdims=True)

        def near_nothing(slack: float) -> np.ndarray:
            small = (left < floor * slack) | (report.raw < shadow * slack)
            return (lost < self.drop * slack) & small

        grown = (report.raw >= self.hysteresis * self._low) & (report.raw > 0)
        back = ~near_nothing(self.hysteresis) & (lost >= self.drop) & grown
        collapsed, recovered = self._collapsed.update(report.step, living & near_nothing(1.0), back)

        awake = (left >= self.hysteresis * self.floor) & grown
        dormant, woke = self._dormant.update(report.step, self._unborn(report), awake)
        self._low = np.where(collapsed | dormant, report.raw, self._low)

        events = []
        judged: tuple[tuple[EventKind, np.ndarray, Latch], ...] = (
            ("collapsed", collapsed, self._collapsed),
            ("recovered", recovered, self._collapsed),
            ("dormant", dormant, self._dormant),
            ("woke", woke, self._dormant),
        )
        for kind, mask, latch in judged:
            events += [report.head(kind, layer, head, since) for layer, head, since in _where(mask, latch)]
        return events

    def _unborn(self, report: ProbeReport) -> np.ndarray:
        """Heads that, now that they are old enough, have never come alive; not in a layer that is all zero."""
        of_age = self._present & (self._age + 1 == self.dormant_after) & ~self._collapsed.active
        never = self._share.value * report.heads < self.floor
        return of_age & never & (report.raw.sum(axis=1, keepdims=True) > 0)

    def _judge_dominance(self, report: ProbeReport) -> list[HeadEvent]:
        judged = self._present & (self._age >= self.warmup) & (report.heads >= 3)
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
        elif self._age[at] < self.warmup:
            status = "warming"
        peak = float(self._raw.value[at])
        kept = float(self._raw.last[at]) / peak if peak > 0 else math.nan
        return HeadState(status, float(self._share.last[at]), float(self._share.value[at]), kept, since)


def _where(mask: np.ndarray, latch: Latch) -> Iterator[tuple[int, ...]]:
    """Index and first step of each entry of a mask."""
    for at in np.argwhere(mask):
        index = tuple(int(i) for i in at)
        yield *index, int(latch.since[index])
