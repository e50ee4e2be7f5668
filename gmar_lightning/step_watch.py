"""`read="step"`: the numbers of every head read off training steps that are due, instead of probes."""

from __future__ import annotations

from contextlib import ExitStack

from lightning.pytorch import LightningModule, Trainer

from gmar_lightning.explain.inputs import classifier_of
from gmar_lightning.explain.training_step import StepReader
from gmar_lightning.monitor.probing import Moment, Prober
from gmar_lightning.monitor.record import ProbeRecord
from gmar_lightning.monitor.schedule import Every
from gmar_lightning.trainer import callbacks_of, log_position, logged_metrics


class StepWatch:
    """Watches the training steps that are due, and makes a record of each; the steps run as they would without.

    A step is every batch up to the one after which the optimizer is counted as stepped: under accumulation, all of
    them are watched. The first step of a run is read as well.

    Args:
        schedule: Says which steps are due.
        prober: Judges what they show.
    """

    def __init__(self, schedule: Every, prober: Prober) -> None:
        self._schedule, self._prober = schedule, prober
        self._watching = ExitStack()
        self._reader: StepReader | None = None
        self._counted, self._gain = 0, 1
        self._factor, self._scaled = 1.0, False
        self._watched = self._wanted = False

    def begin(self, pl_module: LightningModule, module: str | None, first: bool) -> None:
        """Look at the model before its first step.

        Args:
            pl_module: What is trained.
            module: Dotted path of the classifier inside it, outside of which no attention counts.
            first: Whether the run begins here; its first step is read.

        Raises:
            UnsupportedModelError: It is compiled.
        """
        self._reader = StepReader(classifier_of(pl_module, module), inside=module is not None)
        self._wanted = first

    def before(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before a batch: watch it if the step that it belongs to may be due."""
        self.stop()  # a batch that was skipped has no end
        self._counted = trainer.global_step
        may_be_due = self._wanted or self._schedule.ahead(self._counted + self._gain)
        if self._reader is None or self._prober.spent or not may_be_due:
            return
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self._scaled = scaler is not None and scaler.is_enabled()
        scale = scaler.get_scale() if scaler is not None and self._scaled else 1.0
        # Lightning divides the loss by the number of batches that it accumulates; by hand, nobody does.
        batches = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
        self._factor, self._watched = batches / scale, True
        self._watching.enter_context(self._reader.watching())

    def stop(self) -> None:
        """Watch no more; what was seen is kept until the step has ended."""
        self._watching.close()

    def after(self, trainer: Trainer) -> ProbeRecord | None:
        """After a batch, on every process: the record of the step, if it has ended and was due."""
        self.stop()
        now = trainer.global_step
        due = self._schedule.due(now)
        if self._reader is None or now == self._counted:
            return None
        self._gain = max(self._gain, now - self._counted)  # several optimizers count a batch several times
        watched, self._watched = self._watched, False
        if not watched:
            self._wanted = (
                self._wanted or due
            )  # the count jumped further than ever: the next step makes it good
            return None
        seen = self._reader.signals(self._factor)
        if not (due or self._wanted):
            return None
        moment = Moment(log_position(trainer), now, trainer.current_epoch, logged_metrics(trainer))
        record = self._prober.of_step(seen, moment, self._scaled)
        self._wanted = record is None
        return record


def stop_watching(trainer: Trainer) -> None:
    """Let no callback of the trainer take what is run from here on for the step it watches."""
    for callback in callbacks_of(trainer):
        for watch in getattr(callback, "watches", ()):
            if isinstance(watch.steps, StepWatch):
                watch.steps.stop()
