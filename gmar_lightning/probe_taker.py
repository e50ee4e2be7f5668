"""Draws the probe images of a trainer's run, and takes its probes so that training does not notice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from gmar_lightning.chosen import Choice, chosen_probe, indices_of
from gmar_lightning.monitor.probe import ProbeBatch
from gmar_lightning.monitor.probing import Moment, Prober
from gmar_lightning.monitor.record import ProbeRecord
from gmar_lightning.monitor.say import SayOnce
from gmar_lightning.monitor.selftest import SelfTest
from gmar_lightning.trainer import (
    callable_model,
    draw_images,
    ends_here,
    logged_metrics,
    not_state,
    settings_of_run,
    silenced,
    state_of_run,
)


class ProbeTaker:
    """What a `Prober` needs of a trainer.

    Attributes:
        selftest: Sees to it that a probe leaves no trace.

    Args:
        prober: Explains and judges.
        given: The user's own images, or None.
        choice: How they are chosen from the validation set; None for a class-balanced draw.
        verify: Whether the first probe copies the weights too.
        say: Says a sentence on the console, once.
    """

    def __init__(
        self, prober: Prober, given: ProbeBatch | None, choice: Choice | None, verify: bool, say: SayOnce
    ) -> None:
        self._prober, self._given, self._say = prober, given, say
        self._choice: Choice | None = choice
        self.selftest = SelfTest(verify, say)

    @property
    def spent(self) -> bool:
        """Whether no more probes are taken: three failed in a row, or none leaves the model as it was."""
        return self._prober.probe is None or self._prober.spent or self.selftest.mode == "refused"

    def draw(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        num_images: int,
        names: Sequence[str] | None,
        indices: list[int] | None,
    ) -> tuple[ProbeBatch, list[int] | None]:
        """The probe images, and where in the validation set they are if they were chosen there.

        Args:
            trainer: Has the validation set, and the precision that probes run in.
            pl_module: The model.
            num_images: How many to draw.
            names: Class names that the user gave.
            indices: Those of the run that is continued.
        """
        settings = self._prober.settings = settings_of_run(trainer, pl_module, self._prober.settings)
        given, inputs = self._given, settings.inputs
        if self._choice is not None:
            which: Choice = indices or self._choice
            given = chosen_probe(
                trainer, pl_module, which, num_images, settings.module, names, self._say, inputs
            )
            indices = indices_of(self._choice, given)
        labelled = settings.target == "label"
        probe = draw_images(trainer, pl_module, given, num_images, labelled, self._say, inputs)
        return probe, indices

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs of the prober and the self-test, as plain values."""
        return {"session": self._prober.state_dict(), "selftest": self.selftest.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken; older checkpoints say nothing of the self-test."""
        self._prober.load_state_dict(state["session"])
        self.selftest.load_state_dict(state.get("selftest", self.selftest.state_dict()))

    def take(
        self, trainer: Trainer, pl_module: LightningModule, step: int, first: bool, ended: bool
    ) -> ProbeRecord | None:
        """Take a probe at the logger's x `step`; every process calls. None where none leaves no trace."""
        last = ended or ends_here(trainer)
        moment = Moment(step, trainer.global_step, trainer.current_epoch, logged_metrics(trainer), last)
        with silenced(trainer, pl_module):
            return self.selftest.take(
                lambda model: self._prober.take(model, moment, first),
                callable_model(trainer, pl_module),
                state_of_run(trainer, pl_module),
                not_state(trainer),
            )
