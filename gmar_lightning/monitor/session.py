"""One run's probes: measured, judged, counted; what may fail is caught here. Knows no trainer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from gmar_lightning.explain.gmar import GMARResult
from gmar_lightning.monitor.collapse import CollapseDetector
from gmar_lightning.monitor.confirmation import confirm_by_ablation
from gmar_lightning.monitor.events import HeadEvent
from gmar_lightning.monitor.measurement import Measurement, measure, refused
from gmar_lightning.monitor.probe import ProbeBatch
from gmar_lightning.monitor.record import failure_record, probe_record
from gmar_lightning.monitor.trust import FAITHFULNESS_NAMES, faithfulness_of

MOST_FAILURES = 3


@dataclass(frozen=True, eq=False)
class Outcome:
    """What became of one probe.

    Attributes:
        record: Its line of the record, without time, place and drift.
        found: The measurement; None when the probe failed.
        events: What the detector reported.
    """

    record: dict[str, Any]
    found: Measurement | None = None
    events: list[HeadEvent] = field(default_factory=list)


class ProbeSession:
    """Takes the probes of one run. Every process calls; all of them come to the same outcome.

    Args:
        probe: The images; set when they have been drawn.
        explain: `gmar`, with the form of the explanation already filled in.
        detector: Judges each measurement; None for no judgement.
        target: Which class is explained.
        module: Dotted path of the classifier inside the model.
        micro_batch_size: Images per forward; None takes all at once.
        confirm: Whether new collapses are confirmed by ablation.
        faithfulness_every: Measure how faithful the maps are at every so-manieth probe; None never does.
        on_error: "raise", or "warn" to let the run go on.
        warn: Says a sentence on the console.

    Attributes:
        taken: Probes taken, failed ones included.
        failed: How many of them failed.
        spent: Whether so many failed in a row that no more are taken.
    """

    def __init__(
        self,
        explain: Callable[..., GMARResult],
        *,
        detector: CollapseDetector | None,
        target: Literal["predicted", "label"] | int,
        module: str | None,
        micro_batch_size: int | None,
        confirm: bool,
        faithfulness_every: int | None,
        on_error: Literal["warn", "raise"],
        warn: Callable[[str], None],
    ) -> None:
        self.probe: ProbeBatch | None = None
        self.detector = detector
        self.taken = self.failed = 0
        self._failed_in_a_row = 0
        self._explain, self._module = explain, module
        self._target: Literal["predicted", "label"] | int = target
        self._micro_batch_size, self._confirm, self._on_error = micro_batch_size, confirm, on_error
        self._faithfulness_every = faithfulness_every
        self._warn, self._said = warn, set[str]()

    @property
    def spent(self) -> bool:
        """Whether so many probes failed in a row that no more are taken."""
        return self._failed_in_a_row >= MOST_FAILURES

    def take(
        self,
        model: nn.Module,
        step: int,
        *,
        precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
        first: bool = False,
    ) -> Outcome:
        """Measure and judge the model as it is now.

        Args:
            model: The module to explain.
            step: The logger's x.
            precision: Makes the context that the training forward runs under.
            first: A model that cannot be explained is refused at the first probe, before any step.

        Raises:
            Exception: What went wrong, with `on_error="raise"`, or when the first probe was refused.
        """
        self.taken += 1
        try:
            found = self._measured(model, step, precision)
            events = self._judged(model, step, found, precision)
            flagged = self.detector.flagged if self.detector is not None else []
            record = probe_record(found, events, flagged)
            if self._faithfulness_every is not None:
                record["faithfulness"] = self._faithfulness(model, step, found, precision)
        except Exception as error:
            if self._on_error == "raise" or (first and refused(error)):
                raise
            self._note_failure(error, step)
            return Outcome(failure_record(error))
        self._failed_in_a_row = 0
        return Outcome(record, found, events)

    def say_once(self, sentence: str, key: str | None = None) -> None:
        """Warn, unless that was said before (`key` stands for sentences that differ in detail only)."""
        if (key or sentence) not in self._said:
            self._said.add(key or sentence)
            self._warn(sentence)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as plain values."""
        return {
            "detector": None if self.detector is None else self.detector.state_dict(),
            "taken": self.taken,
            "failed": self.failed,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        if self.detector is not None and state["detector"] is not None:
            self.detector.load_state_dict(state["detector"])
        self.taken, self.failed = state["taken"], state["failed"]

    def _measured(
        self, model: nn.Module, step: int, precision: Callable[[], AbstractContextManager[Any]]
    ) -> Measurement:
        assert self.probe is not None
        found = measure(
            model,
            self.probe,
            self._explain,
            target=self._target,
            micro_batch_size=self._micro_batch_size,
            precision=precision,
        )
        if found.out_of_memory:
            # What did not fit once will not fit the next time either.
            self._micro_batch_size = found.micro_batch_size
            self.say_once(
                f"GMARCallback: the probe at step {step} ran out of memory; from here on it takes "
                f"{found.micro_batch_size} image(s) at a time (micro_batch_size)",
                "memory",
            )
        return found

    def _judged(
        self,
        model: nn.Module,
        step: int,
        found: Measurement,
        precision: Callable[[], AbstractContextManager[Any]],
    ) -> list[HeadEvent]:
        if self.detector is None or self.probe is None:
            return []
        events = self.detector.update(step, found.importance, found.layers)
        if not self._confirm:
            return events
        try:
            return confirm_by_ablation(
                model,
                self.probe,
                found,
                events,
                self.detector.flagged,
                module=self._module,
                precision=precision,
            )
        except Exception as error:
            self.say_once(
                f"GMARCallback: the flags of step {step} could not be confirmed by ablation ({error})",
                "confirm",
            )
            return events

    def _faithfulness(
        self,
        model: nn.Module,
        step: int,
        found: Measurement,
        precision: Callable[[], AbstractContextManager[Any]],
    ) -> dict[str, float]:
        # Always the same names: a CSV file has the columns of its first row.
        numbers = dict.fromkeys(FAITHFULNESS_NAMES, math.nan)
        assert self.probe is not None
        assert self._faithfulness_every is not None
        if (self.taken - 1) % self._faithfulness_every:
            return numbers
        try:
            return faithfulness_of(model, self.probe, found, module=self._module, precision=precision)
        except Exception as error:
            self.say_once(
                f"GMARCallback: the faithfulness of the maps at step {step} could not be measured ({error})",
                "faithfulness",
            )
            return numbers

    def _note_failure(self, error: Exception, step: int) -> None:
        self.failed += 1
        self._failed_in_a_row += 1
        cause = f"{type(error).__name__}: {error}"
        self.say_once(f"GMARCallback: the probe at step {step} failed, training goes on ({cause})", cause)
        if self.spent:
            self.say_once(
                f"GMARCallback: {MOST_FAILURES} probes in a row failed; no more probes in this run", "spent"
            )
