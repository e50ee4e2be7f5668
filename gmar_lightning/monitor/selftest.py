"""The callback's test of itself: what a probe changes in this very run, and how probes are taken from then on."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from itertools import chain
from typing import Any, Literal

import torch
from torch import nn

from gmar_lightning.explain.isolation import Trace, kept, listed
from gmar_lightning.explain.watched import is_sharded
from gmar_lightning.monitor.processes import on_every_process
from gmar_lightning.monitor.record import ProbeRecord
from gmar_lightning.monitor.say import SayOnce

Mode = Literal["same", "restored", "by copy", "refused"]
_NAMED = 6


class SelfTest:
    """Takes probes so that they leave no trace, in the first of three ways that does.

    The first probe is taken with a copy of everything that can be reached, weights included. What changed is put
    back. Where the model holds something that could not be put back, the first probe is taken on a deep copy, to
    see whether the forward changes it. If it does, all probes are taken on a deep copy, refreshed in place before
    each; and if that leaves a trace too, or there is no copying the model, no more are taken. Later probes watch
    the write counters of the weights and copy only those that were written before; all other state is kept at
    each probe. All processes see the same and go the same way.

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
    ) -> ProbeRecord | None:
        """Take a probe and see to it that nothing has changed.

        Args:
            probe: Takes the probe of the model it is given.
            model: The model to explain.
            roots: Name to object: where the state that must not change is looked for.
            skip: Objects that are neither looked into nor copied.

        Returns:
            The record, with `verification` at the first probe and whenever something new was seen; None where
            no probe can be taken any more.
        """
        started, full = time.monotonic(), self._verify and not self._started
        self._started = True
        weights, rehearse = None if full else set(self.changed), full and self.mode != "by copy"
        # Copying a model may run code of the user's, whose traces are put back like those of a forward.
        with kept(roots, weights, skip, rehearse) as trace:
            used = self._to_explain(model, roots, skip, trace.at_risk)
            if used is None:
                return None
            name = next((name for name, root in roots.items() if root is model), type(model).__name__)
            trial = rehearse and used is not model
            with kept({name: used}, set(), skip) if trial else nullcontext(Trace()) as of_copy:
                began = time.monotonic()
                record = probe(used)
                inside = time.monotonic() - began
        news = self._judged(trace, of_copy, record.step, on_copy=used is not model)
        if not full and not news:
            return record
        # What the block costs beside the probe itself is the cost of this test.
        return replace(record, verification=self._report(trace, time.monotonic() - started - inside))

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as plain values."""
        return {"mode": self.mode, "changed": list(self.changed)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken: what left a trace for good is not tried again."""
        self.changed = list(state["changed"])
        if state["mode"] == "refused":
            self._refuse(f"before this run was resumed, probes changed {listed(self.changed)} for good")
        else:
            self.mode = state["mode"]

    def _to_explain(
        self, model: nn.Module, roots: Mapping[str, Any], skip: tuple[Any, ...], at_risk: list[str]
    ) -> nn.Module | None:
        """The model itself, or a copy; None where a copy is needed and cannot be had."""
        inside = tuple(f"{name}." for name, root in roots.items() if root is model)
        trial = any(on_every_process(lambda: any(path.startswith(inside) for path in at_risk)))
        if self.mode != "by copy" and not trial:
            return model
        made: list[nn.Module] = []
        try:
            # Nothing is returned: what is returned goes to all processes.
            on_every_process(lambda: made.append(self._copied(model, skip)))
        except Exception as error:
            if self.mode != "by copy":
                return model  # most of what cannot be put back is never written
            self._refuse(f"the model cannot be copied ({type(error).__name__}: {error})")
            return None
        return made[0]

    def _judged(self, trace: Trace, of_copy: Trace, step: int, on_copy: bool) -> bool:
        def lost(one: Trace) -> list[str]:
            return [path for path in one.left if path not in one.watched]

        found = on_every_process(
            lambda: (trace.changed + of_copy.watched, lost(trace), lost(of_copy), trace.live)
        )
        # In one order everywhere, each path once.
        changed, gone, spared, live = (
            list(dict.fromkeys(chain.from_iterable(paths))) for paths in zip(*found, strict=True)
        )
        new = [path for path in changed if path not in set(self.changed)]
        self.changed += new
        put_back = [path for path in new if path not in {*gone, *spared}]
        if live:
            self._refuse(f"the forward draws from {listed(live)}, which can be neither rewound nor copied")
        elif gone and on_copy:
            self._refuse(
                f"the probe at step {step} changed {listed(gone)} for good, though on a copy of the model"
            )
        elif gone:
            self.mode = "by copy"
            self._say(
                f"GMARCallback: the probe at step {step} changed {listed(gone)} for good; from here on a copy of "
                "the model is explained"
            )
        elif spared:
            self.mode = "by copy"
            self._say(
                f"GMARCallback: the forward changes {listed(spared)}, which cannot be put back; a copy of the model "
                "is explained"
            )
        elif put_back:
            self.mode = "restored" if self.mode == "same" else self.mode
            self._say(
                f"GMARCallback: the forward changes {listed(put_back)}; every probe puts that back"
                + (f" (except, at step {step}, {listed(trace.watched)})" if trace.watched else "")
            )
        if self.mode != "by copy":
            self._twins.clear()
        return bool(new or gone or spared or live)

    def _refuse(self, reason: str) -> None:
        self.mode = "refused"
        self._say(f"GMARCallback: {reason}; no more probes are taken in this run")

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
        if is_sharded(model):
            raise TypeError("its weights are sharded")
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
