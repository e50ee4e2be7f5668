"""What a run does when heads collapse: a word, an alert, a stop, or what the user wrote."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn

from gmar_lightning.monitor.attention_kinds import RULES
from gmar_lightning.monitor.events import HeadEvent
from gmar_lightning.monitor.record import ProbeRecord
from gmar_lightning.recording import Tolerance
from gmar_lightning.show.console import alarm_text

# What is worth stopping for, and what is worth a word: attention can degenerate in a model that still learns.
_ALARMS = ("collapsed", "layer_vanishing", "nonfinite")
_WARNINGS = tuple(rule.kind for rule in RULES)


class Reaction:
    """Acts on what the detector reports, on every process.

    Collapsed heads, vanished layers and importance that is not finite are alarms. Attention that degenerates
    (`attention_kinds.RULES`) is warned of and goes with the loggers' alerts, but never stops a run and never
    calls a callable written for collapses.

    Args:
        on_collapse: "warn", "alert" (the loggers' alert too), "stop" (graceful), or a callable
            `(trainer, pl_module, events)`.
        tolerance: What happens where that callable fails.
        path: Of the module, where several are watched.
    """

    def __init__(
        self,
        on_collapse: Literal["warn", "alert", "stop"] | Callable[..., None],
        tolerance: Tolerance,
        path: str | None = None,
    ) -> None:
        self._on_collapse, self._tolerance, self._path = on_collapse, tolerance, path
        self._nonfinite = False

    def to(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        record: ProbeRecord,
        alert: Callable[[str, str], None],
    ) -> None:
        """React to one probe's events; a failure is no failure of the run.

        Args:
            trainer: Stopped, with "stop".
            pl_module: Handed to a callable.
            record: The probe, with what the detector reported.
            alert: Sends title and text to the loggers.
        """
        self._tolerance.run(
            "on_collapse", lambda: self._react(trainer, pl_module, record.events, alert), record.step
        )

    def _react(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        events: Sequence[HeadEvent],
        alert: Callable[[str, str], None],
    ) -> None:
        nonfinite = any(event.kind == "nonfinite" for event in events)
        # Importance that stays broken is one alarm, not one for each probe.
        repeated, self._nonfinite = nonfinite and self._nonfinite, nonfinite
        alarms = [event for event in events if event.kind in _ALARMS and not repeated]
        said = [event for event in events if event in alarms or event.kind in _WARNINGS]
        if callable(self._on_collapse):
            said = [event for event in said if event not in alarms]  # those are the callable's
            if alarms:
                self._on_collapse(trainer, pl_module, alarms)
        if not said:
            return
        text = alarm_text(said) if self._path is None else f"in {self._path}: {alarm_text(said)}"
        rank_zero_warn(f"GMARCallback: {text}")
        if self._on_collapse in ("alert", "stop"):
            alert("GMAR: attention heads", text)
        if self._on_collapse == "stop" and alarms:
            trainer.should_stop = True
