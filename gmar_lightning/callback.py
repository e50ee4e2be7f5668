"""The Lightning callback: when to probe, which module, and whom to hand the result."""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from gmar_lightning.arguments import (
    ConfigurationError,
    check_choice,
    check_counts,
    check_display,
    check_faithfulness_every,
    check_target,
    given_probe,
)
from gmar_lightning.chosen import Choice, chosen_probe
from gmar_lightning.explain.gmar import check_form
from gmar_lightning.explain.importance import Norm
from gmar_lightning.explain.inputs import classifier_of
from gmar_lightning.explain.rollout import Rollout
from gmar_lightning.monitor.collapse import CollapseDetector
from gmar_lightning.monitor.drift import DriftTracker
from gmar_lightning.monitor.events import HeadEvent
from gmar_lightning.monitor.history import History
from gmar_lightning.monitor.probe import ProbeBatch
from gmar_lightning.monitor.probing import Moment, Prober
from gmar_lightning.monitor.processes import of_first_process
from gmar_lightning.monitor.record import ProbeRecord
from gmar_lightning.monitor.say import SayOnce
from gmar_lightning.monitor.schedule import Every
from gmar_lightning.monitor.selection import checked_choice
from gmar_lightning.monitor.selftest import SelfTest
from gmar_lightning.monitor.settings import ProbeSettings, Target
from gmar_lightning.show.console import alarm_text
from gmar_lightning.show.dashboard import as_metrics
from gmar_lightning.show.publisher import Display, Publisher
from gmar_lightning.trainer import (
    callable_model,
    class_names_of,
    default_folder,
    draw_images,
    ends_here,
    is_alone,
    is_smoke_test,
    log_position,
    logged_metrics,
    not_state,
    photographs,
    planned_probes,
    silenced,
    state_of_run,
)
from gmar_lightning.version import __version__

# What is worth waking up for.
_ALARMS = ("collapsed", "layer_vanishing", "nonfinite")


class GMARCallback(Callback):
    """Watch a Vision Transformer while it trains: heatmaps, head importance, heads that collapse.

    A fixed, class-balanced batch of validation images is explained before the first optimizer step, at every
    interval and at the end. Training is not disturbed: with and without the callback, the final weights are
    bit-identical.

    Logged with the x-axis of Lightning's own training rows: `gmar/heatmaps`, `gmar/inputs` (once),
    `gmar/head_importance` (layers x heads, flagged heads crossed), `gmar/head_evolution`, and the numbers of
    `show.keys`; the numbers are in `trainer.callback_metrics` too, for other callbacks to monitor.

    Args:
        every_n_train_steps: Probe whenever this many more optimizer steps were taken; 100 when neither
            interval is given.
        every_n_epochs: Probe whenever this many more epochs have ended, instead.
        num_images: Probe size, drawn class-balanced from the validation set, fixed for the run.
        num_heatmaps: How many of them are drawn.
        probe_batch: Your own `(images, labels)`, or a mapping with `images` and optionally `labels`.
        probe_images: Which images instead of a class-balanced draw: a folder of image files (the class is the name
            of the folder a file lies in), a list of indices of the validation set, "hardest" (highest loss before
            the first step) or "misclassified". The latter two look at up to 256 images, once.
        module: Dotted path of the classifier inside the LightningModule; None calls its forward.
        target: The explained class, "predicted", "label", or a class index; or a callable `(output) -> (batch,)` on
            what the model returns (`gmar_lightning.targets`).
        norm: "l1", "l2" or "uniform", see `gmar`.
        rollout: "gradient", "paper", "flow", "rollout" or "last_layer", see `gmar`.
        residual: Weight of the residual path, 1 when None.
        micro_batch_size: Images per forward; None takes the whole probe at once.
        detector: The collapse detector; None switches it off.
        on_collapse: What to do when heads collapse: "warn", "alert" (W&B alert too), "stop" (graceful), or a
            callable `(trainer, pl_module, events)`, called on every process.
        confirm: Measure by ablation what newly flagged heads still contribute: five forwards over the probe
            images, and four with their backwards, at probes that flag, none at others.
        faithfulness_every: When four of the maps are tested: insertion minus deletion, average drop, beside a random
            map and plain rollout, class sensitivity, randomisation (about 29 forwards, and two with their backwards,
            per image). "ends" tests at the first and the last probe, a number at the first and after each so many
            more, None never.
        on_error: "warn" lets training go on after a failed probe, "raise" does not.
        mean: Channel means for display; found from the datamodule, the module or timm when possible.
        std: Channel standard deviations, likewise.
        class_names: For captions; found likewise.
        log_per_head: One scalar per head, hidden from automatic panels.
        max_events: Pictures of at most so many probes are logged; scalars always are.
        save_dir: Local record; `<trainer log dir>/gmar` when None.
        verify: Whether the first probe also copies the weights, to see whether the forward writes them.

    Raises:
        ConfigurationError: For arguments that do not fit, with what to change.
    """

    def __init__(
        self,
        every_n_train_steps: int | None = None,
        every_n_epochs: int | None = None,
        num_images: int = 32,
        num_heatmaps: int = 8,
        probe_batch: Any = None,
        module: str | None = None,
        target: Target = "predicted",
        norm: Norm = "l1",
        rollout: Rollout = "gradient",
        residual: float | None = None,
        micro_batch_size: int | None = None,
        detector: CollapseDetector | Literal["default"] | None = "default",
        on_collapse: Literal["warn", "alert", "stop"] | Callable[..., None] = "alert",
        confirm: bool = True,
        faithfulness_every: int | Literal["ends"] | None = "ends",
        on_error: Literal["warn", "raise"] = "warn",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        class_names: Sequence[str] | None = None,
        log_per_head: bool = False,
        max_events: int = 100,
        save_dir: str | os.PathLike[str] | None = None,
        probe_images: str | os.PathLike[str] | Sequence[int] | None = None,
        verify: bool = True,
    ) -> None:
        super().__init__()
        if every_n_train_steps is None and every_n_epochs is None:
            every_n_train_steps = 100
        try:
            self._schedule = Every(steps=every_n_train_steps, epochs=every_n_epochs)
            check_form(norm, rollout, residual, micro_batch_size)
            self._given = given_probe(probe_batch)
            self._choice: Choice | None = None if probe_images is None else checked_choice(probe_images)
        except ValueError as error:
            raise ConfigurationError(str(error)) from None
        if self._given is not None and self._choice is not None:
            raise ConfigurationError("probe_batch and probe_images are two answers to one question: give one")
        check_counts(num_images=num_images, num_heatmaps=num_heatmaps, max_events=max_events)
        check_faithfulness_every(faithfulness_every)
        check_choice("on_error", on_error, ("warn", "raise"))
        if not callable(on_collapse):
            check_choice("on_collapse", on_collapse, ("warn", "alert", "stop"), "or a callable")
        check_target(target, self._given)
        self.num_images, self.num_heatmaps, self.max_events = num_images, num_heatmaps, max_events
        self.module, self.micro_batch_size = module, micro_batch_size
        self.target: Target = target
        self.norm: Norm = norm
        self.rollout: Rollout = rollout
        self.residual = residual
        self.on_collapse, self.confirm = on_collapse, confirm
        self.faithfulness_every: int | Literal["ends"] | None = faithfulness_every
        self.on_error: Literal["warn", "raise"] = on_error
        self.mean, self.std = check_display("mean", mean), check_display("std", std)
        self.class_names, self.log_per_head, self.save_dir = class_names, log_per_head, save_dir
        self._fresh_detector = CollapseDetector() if detector == "default" else detector
        self._settings = ProbeSettings(
            target=target,
            norm=norm,
            rollout=rollout,
            residual=residual,
            module=module,
            micro_batch_size=micro_batch_size,
            confirm=confirm,
            faithfulness_every=faithfulness_every,
            drawn=num_heatmaps,
        )
        self.verify = verify
        self._restored: dict[str, Any] | None = None
        self._begin_run()

    def _begin_run(self) -> None:
        self._schedule.reset()
        self._say = SayOnce(rank_zero_warn)
        self._selftest = SelfTest(self.verify, self._say)
        self._prober = Prober(
            self._settings,
            detector=copy.deepcopy(self._fresh_detector),
            on_error=self.on_error,
            say=self._say,
        )
        self._history: History | None = None  # on process zero only, as is the publisher
        self._publisher: Publisher | None = None
        self._last_probe: tuple[int, int] | None = None  # (optimizer steps, logger's x)
        self._probe_seconds, self._fit_started = 0.0, time.monotonic()
        self._folder: str | None = None
        self._fingerprint: str | None = None
        self._indices: list[int] | None = None
        self._nonfinite, self._closed, self._trainer = False, False, 0

    @property
    def detector(self) -> CollapseDetector | None:
        """The detector of the current run."""
        return self._prober.detector

    @property
    def state_key(self) -> str:
        """Tells apart several callbacks in one trainer."""
        return self._generate_state_key(
            unit=self._schedule.unit,
            interval=self._schedule.interval,
            num_images=self.num_images,
            module=self.module,
            target=str(self.target) if callable(self.target) else self.target,
            norm=self.norm,
            rollout=self.rollout,
            save_dir=None if self.save_dir is None else str(self.save_dir),
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work before anything is loaded."""
        if stage != "fit":
            return
        if trainer.barebones:
            raise ConfigurationError(
                "Trainer(barebones=True) switches everything off that costs time; GMARCallback is such a thing. "
                "Remove one of the two."
            )
        if self.module is None and type(pl_module).forward is LightningModule.forward:
            children = ", ".join(name for name, _ in pl_module.named_children()) or "none"
            raise ConfigurationError(
                f"{type(pl_module).__name__} defines no forward(images) -> logits. Name the classifier inside it "
                f"with GMARCallback(module=...); its children: {children}"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the probe images, open or continue the record, and probe the untrained model."""
        try:
            classifier_of(pl_module, self.module)
        except ValueError as error:
            raise ConfigurationError(str(error)) from None
        restored, self._restored = self._restored, None
        if restored is not None or trainer.global_step == 0 or self._trainer != id(trainer):
            self._begin_run()
        if restored is not None:
            self._continue_from(restored)
        self._trainer, self._closed, self._fit_started = id(trainer), False, time.monotonic()
        # The plugin of this trainer; a callback may serve several one after the other.
        precision = trainer.precision_plugin.forward_context
        self._prober.settings = dataclasses.replace(self._prober.settings, precision=precision)
        probe = draw_images(
            trainer,
            pl_module,
            self._chosen(trainer, pl_module),
            num_images=self.num_images,
            target="predicted" if callable(self.target) else self.target,
            say=self._say,
        )
        self._open_record(trainer, pl_module, probe, resumed=restored is not None)
        if self._last_probe is None:
            started_at = trainer.global_step if self._schedule.unit == "step" else trainer.current_epoch
            self._schedule.reset(started_at)
            self._run_probe(trainer, pl_module, log_position(trainer), first=True)

    def _chosen(self, trainer: Trainer, pl_module: LightningModule) -> ProbeBatch | None:
        """The user's own images, or those that `probe_images` names; None for the class-balanced draw."""
        # Which images are the hardest changes as the model learns: a resumed run keeps those of its beginning.
        choice = self._choice if self._indices is None else self._indices
        if self._given is not None or choice is None:
            return self._given
        probe = chosen_probe(
            trainer,
            pl_module,
            choice,
            num_images=self.num_images,
            module=self.module if isinstance(self.module, str) else None,
            class_names=self.class_names,
            say=self._say,
        )
        if isinstance(self._choice, str) and probe.names is not None:
            self._indices = [int(name.removeprefix("image ")) for name in probe.names]
        return probe

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Probe when the step count has crossed a multiple of the interval."""
        if self._schedule.unit == "step" and self._schedule.due(trainer.global_step):
            self._run_probe(trainer, pl_module, log_position(trainer))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Probe when the epoch count has crossed a multiple of the interval."""
        if self._schedule.unit == "epoch" and self._schedule.due(trainer.current_epoch + 1):
            self._run_probe(trainer, pl_module, log_position(trainer, ended=True))
        elif self._schedule.unit == "step" and trainer.global_step == 0:
            self._say(
                "GMARCallback: an epoch went by and Lightning counted no optimizer step (optimizers stepped by "
                "hand?); use every_n_epochs"
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Probe the trained model, write the report, and say what the run was."""
        position = log_position(trainer, ended=True)
        if self._last_probe is not None and self._last_probe[0] != trainer.global_step:
            position = max(position, self._last_probe[1] + 1)
        self._run_probe(trainer, pl_module, position, ended=True)
        self._close(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the record cleanly when training stops early, by Ctrl-C or by an error."""
        self._close(trainer)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as plain values."""
        return {
            "schedule": self._schedule.state_dict(),
            "last_probe": list(self._last_probe or ()),
            "session": self._prober.state_dict(),
            "fingerprint": self._fingerprint,
            "folder": self._folder,
            "probe_images": self._indices,
            "probe_seconds": self._probe_seconds,
        }

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Find the state of a run that was set up otherwise: another interval, folder or default, the same run."""
        states = checkpoint.get("callbacks", {})
        ours = [state for key, state in states.items() if key.startswith(type(self).__qualname__)]
        if self.state_key not in states and len(ours) == 1 and is_alone(trainer, self):
            self.load_state_dict(ours[0])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue a run; takes effect when training starts."""
        # Tuners save and restore before the first probe: nothing to continue.
        self._restored = dict(state_dict) if state_dict["last_probe"] else None

    def _continue_from(self, state: Mapping[str, Any]) -> None:
        self._schedule.load_state_dict(state["schedule"])
        self._last_probe = (state["last_probe"][0], state["last_probe"][1])
        self._prober.load_state_dict(state["session"])
        self._fingerprint, self._folder = state["fingerprint"], state["folder"]
        self._indices = state.get("probe_images")  # missing in older checkpoints
        self._probe_seconds = state["probe_seconds"]

    def _open_record(
        self, trainer: Trainer, pl_module: LightningModule, probe: ProbeBatch, resumed: bool
    ) -> None:
        changed = self._fingerprint is not None and self._fingerprint != probe.fingerprint
        if changed:
            self._say(
                "GMARCallback: the validation set gives other probe images than before; the record starts a new "
                "segment"
            )
        self._fingerprint = probe.fingerprint
        self._folder = str(self.save_dir or self._folder or default_folder(trainer, self))
        again = self._prober.probe is not None and not changed
        if trainer.is_global_zero and not again:
            self._history = self._opened(trainer, pl_module, probe, resumed or changed)
            self._publisher = self._publisher_of(trainer, pl_module, probe, self._history)
        if again:
            return
        # Every process tells how far the maps have moved, so all of them need the ones to compare with.
        ends = of_first_process(
            None if self._history is None else self._history.ends_of_segment(self.rollout)
        )
        segment, first, last = (0, None, None) if ends is None else ends
        self._prober.begin(probe, segment, DriftTracker(first, last))

    def _opened(
        self, trainer: Trainer, pl_module: LightningModule, probe: ProbeBatch, resumed: bool
    ) -> History:
        on_disk = self.save_dir is not None or not is_smoke_test(trainer)
        if not trainer.loggers and on_disk:
            rank_zero_info(f"GMARCallback: no logger; the record goes to {self._folder}")
        labels = None if probe.labels is None else probe.labels.tolist()
        names = self.class_names or class_names_of(trainer, pl_module)
        run = {
            "version": __version__,
            "num_images": len(probe),
            "num_heatmaps": min(self.num_heatmaps, len(probe)),
            "labels": labels,
            "class_names": None if names is None else list(names),
            "image_names": None if probe.names is None else list(probe.names),
            "fingerprint": probe.fingerprint,
            "settings": self._described(),
        }
        try:
            return History.open(
                self._folder if on_disk else None, run, trainer.global_step if resumed else None
            )
        except (OSError, ValueError) as error:
            rank_zero_warn(
                f"GMARCallback: no record can be written to {self._folder} ({error}); the run goes on without it"
            )
            return History.open(None, run)

    def _publisher_of(
        self, trainer: Trainer, pl_module: LightningModule, probe: ProbeBatch, history: History
    ) -> Publisher:
        images = probe.images[: self.num_heatmaps]
        pictures = photographs(trainer, pl_module, images, self.mean, self.std, self._say, probe.masks)
        self._guarded("the record", lambda: history.save_inputs(pictures), trainer.global_step)
        planned = planned_probes(trainer, self._schedule.unit, self._schedule.interval)
        display = Display(
            images=pictures,
            labels=history.segment_run(history.segment).get("labels"),
            names=history.run.get("class_names"),
            image_names=probe.names,
            per_head=self.log_per_head,
            media_every=max(1, math.ceil((planned or 0) / self.max_events)),
        )
        return Publisher(history, trainer.loggers, display, self._say)

    def _described(self) -> dict[str, Any]:
        """The settings as the record and the loggers' configuration say them."""
        names = ("num_images", "num_heatmaps", "module", "target", "norm", "rollout")
        return {
            "every": f"{self._schedule.interval} {self._schedule.unit}s",
            **{name: getattr(self, name) for name in names},
            "target": str(self.target) if callable(self.target) else self.target,
            "residual": 1.0 if self.residual is None else self.residual,
        }

    def _run_probe(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        step: int,
        first: bool = False,
        ended: bool = False,
    ) -> None:
        now = (trainer.global_step, step)
        if not self._needed(trainer, now, first):
            return
        started, self._last_probe = time.monotonic(), now
        last = ended or ends_here(trainer)
        moment = Moment(step, now[0], trainer.current_epoch, logged_metrics(trainer), last)
        with silenced(trainer, pl_module):
            record = self._selftest.take(
                lambda model: self._prober.take(model, moment, first),
                callable_model(trainer, pl_module),
                state_of_run(trainer, pl_module),
                not_state(trainer),
            )
        self._publish(trainer, record)
        self._react(trainer, pl_module, record.events)
        self._probe_seconds += time.monotonic() - started

    def _needed(self, trainer: Trainer, now: tuple[int, int], first: bool) -> bool:
        # Steps 0 and 1 share an x: one probe. Lightning also repeats an x after a resume, but there a probe left
        # out would be a gap. Without a counted step the weights are the same, unless optimizers are stepped by
        # hand.
        last = self._last_probe
        repeats = last is not None and (
            now <= last or now[0] == last[0] > 0 or (last[0] == 0 and now[1] <= last[1])
        )
        spent = self._prober.spent or self._selftest.mode == "refused"
        over = self._prober.probe is None or spent or (is_smoke_test(trainer) and not first)
        return not repeats and not over

    def _publish(self, trainer: Trainer, record: ProbeRecord) -> None:
        if record.failure is None:
            trainer.callback_metrics.update(as_metrics(record))
        history, publisher = self._history, self._publisher
        if history is not None:
            self._guarded("the record", lambda: history.append(record), record.step)
        if publisher is not None:
            self._guarded("the display", lambda: publisher.show(record), record.step)

    def _guarded(self, what: str, action: Callable[[], object], step: int) -> None:
        try:
            action()
        except OSError as error:
            # A full or vanished disk is no mistake of the run: it goes on whatever `on_error` says.
            self._say(
                f"GMARCallback: {what} failed at step {step} and is left out ({type(error).__name__}: {error})",
                what,
            )
        except Exception as error:
            self._shrug(f"{what} failed", error, step)

    def _react(self, trainer: Trainer, pl_module: LightningModule, events: Sequence[HeadEvent]) -> None:
        nonfinite = any(event.kind == "nonfinite" for event in events)
        repeated, self._nonfinite = nonfinite and self._nonfinite, nonfinite
        alarms = [event for event in events if event.kind in _ALARMS and not repeated]
        if not alarms:
            return
        if callable(self.on_collapse):
            try:
                self.on_collapse(trainer, pl_module, alarms)
            except Exception as error:
                self._shrug("on_collapse failed", error, alarms[0].step)
            return
        text = alarm_text(alarms)
        rank_zero_warn(f"GMARCallback: {text}")
        if self.on_collapse in ("alert", "stop") and self._publisher is not None:
            self._publisher.alert("GMAR: attention heads", text)
        if self.on_collapse == "stop":
            trainer.should_stop = True

    def _close(self, trainer: Trainer) -> None:
        if self._closed or self._publisher is None or not self._publisher.history.records:
            return
        self._closed = True
        try:
            lines = self._publisher.close(
                metrics=logged_metrics(trainer),
                counts=(self._prober.taken, self._prober.failed),
                seconds=(self._probe_seconds, time.monotonic() - self._fit_started),
            )
            trainer.print("\n".join(lines))
        except Exception as error:
            self._shrug("the run could not be summed up", error, trainer.global_step)

    def _shrug(self, what: str, error: Exception, step: int) -> None:
        if self.on_error == "raise":
            raise error
        self._say(
            f"GMARCallback: {what} at step {step}, training goes on ({type(error).__name__}: {error})", what
        )
