"""The callback's test of itself: what a probe changes in this very run, and how probes are taken from then on."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from gmar_lightning.explain.isolation import Trace, kept
from gmar_lightning.monitor.record import ProbeRecord
from gmar_lightning.monitor.say import SayOnce

Mode = Literal["same", "restored", "by copy", "refused"]
_NAMED = 6


class SelfTest:
    """Takes probes so that they leave no trace, in the first of three ways that does.

    The first probe is taken with a copy of everything that can be reached, weights included. What changed is put
    back. What could not be put back decides how the next probes are taken: on a deep copy of the model, refreshed
    in place before each; and if that leaves a trace too, not at all. Later probes watch the write counters of
    the weights and copy only those that were written before; all other state is kept at each probe.

    Args:
        verify: Whether the first probe copies the weights as well.
        say: Says a sentence on the console, once.

    Attributes:
        mode: How probes are taken.
        changed: Paths of what probes were seen to change.
    """

    def __init__(self, verify: bool, say: SayOnce) -> None:
        self._verify, self._say = verify, say
        self._started = False
        self.mode: Mode = "same"
        self.changed: list[str] = []
        self._twins: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def take(
        self,
        probe: Callable[[nn.Module], ProbeRecord],
        model: nn.Module,
        roots: Mapping[str, Any],
        skip: tuple[Any, ...] = (),
    ) -> ProbeRecord:
        """Take a probe and see to it that nothing has changed.

        Args:
            probe: Takes the probe of the model it is given.
            model: The model to explain.
            roots: Name to object: where the state that must not change is looked for.
            skip: Objects that are neither looked into nor copied.

        Returns:
            The record, with `verification` at the first probe and whenever something new was seen.
        """
        started, first = time.monotonic(), not self._started
        self._started = True
        weights = None if first and self._verify else set(self.changed)
        used = self._copied(model, skip) if self.mode == "by copy" else model
        # What the block costs beside the probe itself is the cost of this test.
        inside = 0.0
        with kept(roots, weights, skip) as trace:
            began = time.monotonic()
            record = probe(used)
            inside = time.monotonic() - began
        news = self._judged(trace, record.step)
        if not (first and self._verify) and not news:
            return record
        seconds = time.monotonic() - started - inside
        return replace(record, verification=self._report(trace, seconds))

    def _judged(self, trace: Trace, step: int) -> bool:
        known = set(self.changed)
        new = [path for path in dict.fromkeys(trace.changed) if path not in known]
        self.changed += new
        # Weights that were written for the first time are copied from here on, which puts them back.
        left = [path for path in trace.left if path in known or self.mode == "by copy" or not new]
        if left:
            self.mode = "refused" if self.mode == "by copy" else "by copy"
            then = (
                "no more probes are taken in this run"
                if self.mode == "refused"
                else "from here on a copy of the model is explained"
            )
            self._say(f"GMARCallback: the probe at step {step} changed {_listed(left)} for good; {then}")
        elif new:
            self.mode = "restored" if self.mode == "same" else self.mode
            self._say(
                f"GMARCallback: the forward changes {_listed(new)}; every probe puts that back"
                + (f" (except, at step {step}, {_listed(trace.left)})" if trace.left else "")
            )
        return bool(new or left)

    def _report(self, trace: Trace, seconds: float) -> dict[str, Any]:
        return {
            "mode": self.mode,
            "changed": self.changed[:_NAMED],
            "changes": len(self.changed),
            "not_restored": trace.left[:_NAMED],
            "complete": not trace.truncated,
            "seconds": round(seconds, 4),
        }

    def _copied(self, model: nn.Module, skip: tuple[Any, ...]) -> nn.Module:
        """A deep copy; its weights are made once and refreshed in place, everything else is copied anew."""
        memo: dict[int, Any] = {id(thing): thing for thing in skip}
        for weight in model.parameters():
            _, twin = self._twins.get(id(weight), (weight, None))
            if twin is None:
                twin = copy.deepcopy(weight)
            else:
                with torch.no_grad():
                    twin.copy_(weight)
            self._twins[id(weight)] = (weight, twin)  # the weight is held, so that its address stays its own
            memo[id(weight)] = twin
        return copy.deepcopy(model, memo)


def _listed(paths: list[str]) -> str:
    return ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
