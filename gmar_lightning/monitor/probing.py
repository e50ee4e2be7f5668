"""Model in, `ProbeRecord` out: one run's probes are explained, judged and counted here. Knows no trainer."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from torch import nn

from gmar_lightning.explain.errors import UnsupportedModelError
from gmar_lightning.explain.training_step import StepSignals, over_processes
from gmar_lightning.monitor.class_scores import explained_classes, recorded_classes, with_known_output
from gmar_lightning.monitor.collapse import CollapseDetector
from gmar_lightning.monitor.confirmation import confirm_by_ablation
from gmar_lightning.monitor.drift import DriftTracker
from gmar_lightning.monitor.events import HeadEvent
from gmar_lightning.monitor.explanation import Explanation, explain_together
from gmar_lightning.monitor.live import FAITHFULNESS, SANITY, measure_faithfulness
from gmar_lightning.monitor.probe import ProbeBatch
from gmar_lightning.monitor.processes import gathered, on_every_process, refused
from gmar_lightning.monitor.record import ProbeRecord
from gmar_lightning.monitor.say import SayOnce, without_folders
from gmar_lightning.monitor.settings import ProbeSettings

# So many failures in a row, and no more probes are taken: what fails three times fails always.
MOST_FAILURES = 3

_NOTHING_SEEN = (
    'no gradient came by an attention layer of the training step: read="step" sees calls of '
    'scaled_dot_product_attention with outputs (batch, heads, tokens, width). Use read="probe"'
)


@dataclass(frozen=True)
class Moment:
    """When a probe is taken.

    Attributes:
        step: The logger's x.
        global_step: Optimizer steps taken.
        epoch: Current epoch.
        metrics: What the trainer had logged last.
        last: Whether the run is expected to end here.
    """

    step: int
    global_step: int
    epoch: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    last: bool = False


class Prober:
    """Takes the probes of one run. Every process calls; all of them come to the same record.

    Args:
        settings: What is asked of the model.
        detector: Judges each probe; None for no judgement.
        on_error: "raise", or "warn" to let the run go on.
        say: Says a sentence on the console, once.

    Attributes:
        settings: What is asked of the model; its micro-batch shrinks when memory runs out.
        detector: The detector.
        probe: The images; None before `begin`.
        segment: Number of this set of images in the record.
        taken: Probes taken, failed ones included.
        failed: How many of them failed.
    """

    def __init__(
        self,
        settings: ProbeSettings,
        *,
        detector: CollapseDetector | None = None,
        on_error: Literal["warn", "raise"] = "warn",
        say: SayOnce | None = None,
    ) -> None:
        self.settings, self.detector = settings, detector
        self.probe: ProbeBatch | None = None
        self.segment = self.taken = self.failed = 0
        self._on_error, self._say = on_error, SayOnce() if say is None else say
        self._failed_in_a_row = 0
        self._drift = DriftTracker()
        # The detector as it was before a state was loaded, until it is known whether that fits the model.
        self._untaught: tuple[tuple[int, ...], CollapseDetector] | None = None

    @property
    def spent(self) -> bool:
        """Whether so many probes failed in a row that no more are taken."""
        return self._failed_in_a_row >= MOST_FAILURES

    def begin(self, probe: ProbeBatch, segment: int = 0, drift: DriftTracker | None = None) -> None:
        """Set the images of the probes to come.

        Args:
            probe: The images.
            segment: Their number in the record.
            drift: Knows the maps that earlier probes of this segment had, when a record is continued.
        """
        self.probe, self.segment = probe, segment
        self._drift = DriftTracker() if drift is None else drift

    def take(self, model: nn.Module, moment: Moment, first: bool = False) -> ProbeRecord:
        """Explain and judge the model as it is now.

        Args:
            model: The module to explain; on a sharded model every process must call.
            moment: When this is.
            first: A model that cannot be explained is refused at the first probe, before any step.

        Returns:
            The record, complete; of a probe that failed, with `failure`.

        Raises:
            Exception: What went wrong, with `on_error="raise"`, or when the first probe was refused.
        """
        started = time.monotonic()
        self.taken += 1
        record = ProbeRecord(
            step=moment.step,
            global_step=moment.global_step,
            epoch=moment.epoch,
            segment=self.segment,
            metrics=moment.metrics,
        )
        try:
            with gathered(model):
                record = self._completed(model, record, moment.last)
        except Exception as error:
            if self._on_error == "raise" or (first and refused(error)):
                raise
            self._note_failure(error, moment.step)
            record = replace(record, failure=without_folders(f"{type(error).__name__}: {error}"))
        else:
            self._failed_in_a_row = 0
        return replace(record, seconds=time.monotonic() - started)

    def of_step(self, seen: StepSignals | None, moment: Moment, scaled: bool = False) -> ProbeRecord | None:
        """Judge what a training step showed; nothing is asked of the model. Every process calls.

        Args:
            seen: What this process saw of the step.
            moment: When this was.
            scaled: Whether the loss was scaled for half precision: such a step may overflow, and is left out of
                training then.

        Returns:
            The record, without maps and with `source="step"`; None for a scaled step that overflowed.

        Raises:
            Exception: What went wrong, with `on_error="raise"`.
        """
        record = ProbeRecord(
            step=moment.step,
            global_step=moment.global_step,
            epoch=moment.epoch,
            metrics=moment.metrics,
            source="step",
        )
        try:
            together = over_processes(on_every_process(lambda: _at_hand(seen)))
            if together is None:
                raise UnsupportedModelError(_NOTHING_SEEN)
            if scaled and not together.finite:
                return None
            tables = {
                "importance": together.importance.numpy(),
                "contribution": together.contribution.numpy(),
            }
            events = self._events(record, tables, together.layers, _learning_rate(moment.metrics))
        except Exception as error:
            if self._on_error == "raise":
                raise
            self.taken += 1
            self._note_failure(error, moment.step)
            return replace(record, failure=without_folders(f"{type(error).__name__}: {error}"))
        self.taken, self._failed_in_a_row = self.taken + 1, 0
        return replace(
            record,
            signals=tables,
            layers=together.layers,
            events=tuple(events),
            flagged=tuple(self.detector.flagged) if self.detector is not None else (),
        )

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
            self._untaught = tuple(state["detector"]["shape"]), copy.deepcopy(self.detector)
            self.detector.load_state_dict(state["detector"])
        self.taken, self.failed = state["taken"], state["failed"]

    def _completed(self, model: nn.Module, record: ProbeRecord, last: bool) -> ProbeRecord:
        """The record with everything that the model has to be asked for."""
        assert self.probe is not None, "begin() hands over the images"
        due = self._maps_are_tested(last)
        explanation = self._explained(model, self.probe, record.step, due)
        classes = explained_classes(model, self.probe, explanation, self.settings) if self.taken == 1 else ""
        signals = explanation.signals()
        events = self._judged(model, self.probe, record, explanation, signals)
        if explanation.scope != "whole":
            self._say(f"GMARCallback: heatmaps: {explanation.scope}. Numbers per head are exact.", "scope")
        return replace(
            record,
            **recorded_classes(explanation),
            signals=signals,
            maps=explanation.maps,
            head_maps=explanation.head_maps,
            layers=explanation.layers,
            classes=classes,
            scores=tuple(explanation.scores.tolist()),
            events=tuple(events),
            flagged=tuple(self.detector.flagged) if self.detector is not None else (),
            drift=self._drift_of(explanation),
            faithfulness=self._faithfulness(model, self.probe, record, explanation, due),
        )

    def _maps_are_tested(self, last: bool) -> bool:
        every = self.settings.faithfulness_every
        if every is None:
            return False
        return self.taken == 1 or last if every == "ends" else (self.taken - 1) % every == 0

    def _explained(self, model: nn.Module, probe: ProbeBatch, step: int, tested: bool) -> Explanation:
        explanation = explain_together(model, probe, self.settings, runner_up=tested)
        explanation = with_known_output(explanation, probe, self.settings)
        if explanation.out_of_memory:
            # What did not fit once will not fit the next time either.
            size = explanation.micro_batch_size
            self.settings = replace(self.settings, micro_batch_size=size)
            self._say(
                f"GMARCallback: the probe at step {step} ran out of memory; from here on it takes "
                f"{size} image(s) at a time (micro_batch_size)",
                "memory",
            )
        return explanation

    def _judged(
        self,
        model: nn.Module,
        probe: ProbeBatch,
        record: ProbeRecord,
        explanation: Explanation,
        signals: Mapping[str, np.ndarray],
    ) -> list[HeadEvent]:
        events = self._events(record, signals, explanation.layers, _context(explanation, record.metrics))
        if self.detector is None or not self.settings.confirm:
            return events
        try:
            return confirm_by_ablation(
                model, probe, explanation, events, self.detector.flagged, self.settings
            )
        except Exception as error:
            self._say(
                f"GMARCallback: the flags of step {record.step} could not be confirmed by ablation ({error})",
                "confirm",
            )
            return events

    def _events(
        self,
        record: ProbeRecord,
        signals: Mapping[str, np.ndarray],
        layers: tuple[str, ...],
        context: Mapping[str, float],
    ) -> list[HeadEvent]:
        if self.detector is None:
            return []
        if self._untaught is not None and self._untaught[0] != signals["importance"].shape:
            self.detector = self._untaught[1]  # what was known of other heads says nothing of these
        self._untaught = None
        others = {name: table for name, table in signals.items() if name != "importance"}
        named = [f"{self.settings.layer_prefix}{layer}" for layer in layers]
        return self.detector.update(record.step, signals["importance"], named, others, context)

    def _drift_of(self, explanation: Explanation) -> Mapping[str, np.ndarray] | None:
        primary = next(iter(explanation.maps.values()), None)
        return None if primary is None else self._drift.compare(primary)

    def _faithfulness(
        self, model: nn.Module, probe: ProbeBatch, record: ProbeRecord, explanation: Explanation, due: bool
    ) -> dict[str, float] | None:
        if self.settings.faithfulness_every is None:
            return None
        # Always the same names: a CSV file has the columns of its first row.
        nothing = dict.fromkeys((*FAITHFULNESS, *SANITY), math.nan)
        pictures = all(maps.ndim == 3 for maps in explanation.maps.values()) and bool(explanation.maps)
        if not due or not pictures:
            return nothing
        try:
            return measure_faithfulness(model, probe, explanation, self.settings, self._say)
        except Exception as error:
            self._say(
                f"GMARCallback: the faithfulness of the maps at step {record.step} could not be measured ({error})",
                "faithfulness",
            )
            return nothing

    def _note_failure(self, error: Exception, step: int) -> None:
        self.failed += 1
        self._failed_in_a_row += 1
        cause = f"{type(error).__name__}: {error}"
        self._say(f"GMARCallback: the probe at step {step} failed, training goes on ({cause})", cause)
        if self.spent:
            self._say(
                f"GMARCallback: {MOST_FAILURES} probes in a row failed; no more probes in this run", "spent"
            )


def _context(explanation: Explanation, metrics: Mapping[str, float]) -> dict[str, float]:
    """What tells a model that shrinks from one that is sure, or that hardly learns any more."""
    context: dict[str, float] = {}
    chances = explanation.probabilities
    if chances is not None and explanation.targets is not None:
        context["probability"] = float(chances[np.arange(len(chances)), explanation.targets].mean())
    return {**context, **_learning_rate(metrics)}


def _learning_rate(metrics: Mapping[str, float]) -> dict[str, float]:
    # as LearningRateMonitor names them, one for each optimizer and group
    rates = [value for name, value in metrics.items() if name.startswith("lr-")]
    return {"learning_rate": max(rates)} if rates else {}


def _at_hand(seen: StepSignals | None) -> StepSignals | None:
    """On the CPU, in the precision of the detector."""
    if seen is None:
        return None
    importance, contribution = (table.double().cpu() for table in (seen.importance, seen.contribution))
    return StepSignals(importance, contribution, seen.layers, seen.rows, seen.finite)
