"""What importance cannot see: attention, values and tokens that degenerate while the gradient lives on.

Every rule watches how far a head is from one degenerate state: a *margin* that is positive in a working head
and zero in that state, such as one minus the mass on the most attended token. A head is reported when, for
`patience` probes running, its margin is next to nothing, *and* a small part of what the head itself once
held, *and* a small part of what the median head of its layer once held. A head that always was sharp,
uniform or a sink has no margin to lose and is never reported; a whole layer that degenerates is, because it
is compared with what it was. The ways to degenerate are in `attention_kinds`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gmar_lightning.monitor.attention_kinds import RULES, Rule
from gmar_lightning.monitor.causes import Evidence, margins
from gmar_lightning.monitor.events import HeadEvent
from gmar_lightning.monitor.latch import Latch, LevelMemory


class AttentionRules:
    """The rules with their memory.

    Args:
        shape: `(layers, heads)`.
        patience: Probes in a row that raise an event.
        clear_after: Probes in a row that take it back.
        hysteresis: A head is well again once it is above its limits times this.
        warmup: Probes of a signal before anything is raised from it.
    """

    def __init__(
        self, shape: tuple[int, ...], patience: int, clear_after: int, hysteresis: float, warmup: int
    ) -> None:
        self._hysteresis, self._warmup = hysteresis, warmup
        self._memory = LevelMemory(shape)
        self._context = LevelMemory(())
        self._latches = {
            rule.kind: Latch(shape[:1] if rule.whole_layer else shape, patience, clear_after)
            for rule in RULES
        }

    def judge(
        self, step: int, names: Sequence[str], signals: Mapping[str, np.ndarray], idle: np.ndarray
    ) -> list[HeadEvent]:
        """Judge one more probe, before it is taken in.

        Args:
            step: Step of the probe.
            names: Names of the layers.
            signals: Signals by name, `(layers, heads)` each.
            idle: Heads that are collapsed or dormant; nothing more is raised about them.

        Returns:
            What was decided.
        """
        now = margins(signals)
        events: list[HeadEvent] = []
        for rule in RULES:
            if rule.margin not in now:
                continue
            on, off = self._conditions(rule, now, idle)
            latch = self._latches[rule.kind]
            raised, cleared = latch.update(step, on, off)
            for at in np.argwhere(raised | cleared):
                where = tuple(int(index) for index in at)
                events.append(self._event(rule, bool(raised[where]), step, names, signals, where, latch))
        return events

    def evidence(self, signals: Mapping[str, np.ndarray], context: Mapping[str, float] | None) -> Evidence:
        """What a cause can be read from: margins now and as they were held."""
        now, around = margins(signals), _around(context)
        return Evidence(
            now=now,
            held={name: self._memory.reference(name) for name in now},
            sink_value=signals.get("sink_value_norm"),
            context={name: float(value) for name, value in around.items()},
            context_held={name: float(self._context.reference(name)) for name in around},
        )

    def take_in(self, signals: Mapping[str, np.ndarray], context: Mapping[str, float] | None) -> None:
        """Remember one more probe."""
        self._memory.take_in(margins(signals))
        self._context.take_in(_around(context))

    def restart(self) -> None:
        """Forget what is being counted; what was raised stays raised."""
        for latch in self._latches.values():
            latch.restart()

    def state_dict(self) -> dict[str, Any]:
        """Plain lists by name."""
        return {
            "held": self._memory.state_dict(),
            "context": self._context.state_dict(),
            "latches": {kind: latch.state_dict() for kind, latch in self._latches.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`; an empty state, or one without some rule, starts there anew."""
        self._memory.load_state_dict(state.get("held", {}))
        self._context.load_state_dict(state.get("context", {}))
        for kind, part in state.get("latches", {}).items():
            if kind in self._latches:
                self._latches[kind].load_state_dict(part)

    def _conditions(
        self, rule: Rule, now: Mapping[str, np.ndarray], idle: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Where a rule holds, and where it has ceased to."""
        margin, own = now[rule.margin], self._memory.reference(rule.margin)
        judged = (self._memory.age(rule.margin) >= self._warmup) & (own > rule.had) & ~idle
        # The layer as it was, not as it is: a whole layer that degenerates must not hide itself.
        layer = _typical(own)
        next_to_nothing = margin < rule.near
        lost_its_own = margin < rule.kept * own
        unlike_its_layer = margin < rule.beside * layer
        on = judged & next_to_nothing & lost_its_own & unlike_its_layer & ~_explained(rule, now)
        if rule.kind == "constant_values" and "value_norm" in now:
            # Values that are gone are no constant values: that is a collapse, and reported as one.
            on &= now["value_norm"] > 1e-3 * self._memory.reference("value_norm")
        limit = np.minimum(rule.near, np.minimum(rule.kept * own, rule.beside * layer))
        off = margin >= self._hysteresis * limit
        if rule.whole_layer:
            # one value per layer, repeated over its heads
            kept = np.divide(margin, own, out=np.full(own.shape, np.nan), where=own > 0).max(axis=1)
            named = self._latches[rule.kind].active
            alike, off = np.asarray(on.any(axis=1)), np.asarray(off.any(axis=1))
            return _where_it_begins(alike, kept, rule.kept, named), off
        return on, off

    def _event(
        self,
        rule: Rule,
        raised: bool,
        step: int,
        names: Sequence[str],
        signals: Mapping[str, np.ndarray],
        where: tuple[int, ...],
        latch: Latch,
    ) -> HeadEvent:
        layer, head = where[0], None if rule.whole_layer else where[1]
        at = (layer, 0 if head is None else head)
        now = float(signals[rule.signal][at])
        before = _signal_of(rule.margin, float(self._memory.reference(rule.margin)[at]))
        since = int(latch.since[where])
        who = names[layer] if head is None else f"{names[layer]} head {head}"
        if raised:
            what = rule.what.format(now=now, before=before)
            message = f"{who}: since step {since} it {what}; {rule.advice}."
            if rule.kind == "head_copy" and head is not None:
                message = f"{message[:-1]} (most alike: head {_nearest(signals['similarity'][layer], head)})."
        else:
            trouble = rule.kind.replace("_", " ")
            message = f"{who}: {trouble} has ended, since step {since} {rule.signal} is {now:.3g}."
        return HeadEvent(
            step, rule.kind if raised else rule.end, layer, head, names[layer], now, before, since, message
        )


def _where_it_begins(alike: np.ndarray, kept: np.ndarray, much: float, named: np.ndarray) -> np.ndarray:
    """Of the layers that receive alike tokens, those to be named; all `(layers,)` in forward order.

    A layer after one of alike tokens only receives what that one hands on. A layer before a named one that
    makes tokens alike by itself (it kept less than the fraction `much` of what the layer before it kept) only
    reacts to it: what comes back from there no longer tells tokens apart, so training lets them go.
    """
    handed_on = np.concatenate([[False], alike[:-1]])
    by_itself = np.concatenate([[True], kept[1:] < much * kept[:-1]])
    begins = named & by_itself
    after = np.concatenate([begins[1:], [False]])
    reacts = np.flip(np.logical_or.accumulate(np.flip(after)))
    return alike & ~handed_on & ~reacts


def _typical(held: np.ndarray) -> np.ndarray:
    """Median over the heads of each layer, `(layers, 1)`; NaN for a layer without any."""
    some = np.isfinite(held).any(axis=1, keepdims=True)
    return np.where(some, np.nanmedian(np.where(some, held, 0.0), axis=1, keepdims=True), np.nan)


def _explained(rule: Rule, now: Mapping[str, np.ndarray]) -> np.ndarray:
    """Where another degenerate state says the same thing better."""
    explained = np.zeros(now[rule.margin].shape, dtype=bool)
    for name, limit in rule.unless:
        if name in now:
            explained |= now[name] < limit
    return explained


def _signal_of(margin: str, held: float) -> float:
    """The signal that a margin was computed from."""
    if margin in ("focus", "outside sink", "difference", "token difference", "value difference"):
        return 1 - held
    return 1 / held if margin == "calm" else held


def _nearest(similarity: np.ndarray, head: int) -> int:
    """The head whose own nearest neighbour is as near: two copies are each other's."""
    apart = np.abs(similarity - similarity[head])
    apart[head] = np.inf
    return int(np.nanargmin(apart)) if len(apart) > 1 else head


def _around(context: Mapping[str, float] | None) -> dict[str, np.ndarray]:
    """What is known beside the heads, as quantities that fall: doubt of the model, and learning rate."""
    found: dict[str, np.ndarray] = {}
    if context and "probability" in context:
        found["doubt"] = np.asarray(1 - float(context["probability"]))
    if context and "learning_rate" in context:
        found["learning_rate"] = np.asarray(float(context["learning_rate"]))
    return found
