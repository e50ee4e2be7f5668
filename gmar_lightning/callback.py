"""The Lightning callback: when to probe, which module, and whom to hand the result."""

from __future__ import annotations

import copy
import functools
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from gmar_lightning.explain.errors import UnsupportedModelError
from gmar_lightning.explain.gmar import check_form, classifier_of, gmar
from gmar_lightning.explain.importance import Norm
from gmar_lightning.explain.rollout import Rollout
from gmar_lightning.monitor.collapse import CollapseDetector, HeadEvent
from gmar_lightning.monitor.confirmation import confirm_by_ablation
from gmar_lightning.monitor.measurement import Measurement, measure
from gmar_lightning.monitor.probe import ProbeBatch, unpack_batch
from gmar_lightning.monitor.record import failure_record, probe_record
from gmar_lightning.monitor.schedule import Every
from gmar_lightning.show.console import alarm_text
from gmar_lightning.show.panels import as_metrics
from gmar_lightning.show.publisher import Publisher
from gmar_lightning.show.render import enlarged, to_uint8_image
from gmar_lightning.trainer import (
    callable_model,
    class_names_of,
    default_folder,
    draw_from_validation,
    log_position,
    logged_metrics,
    normalisation_of,
    planned_probes,
    silent,
)

__all__ = ["ConfigurationError", "GMARCallback"]

# What is worth waking up for.
_ALARMS = ("collapsed", "layer_vanishing", "nonfinite")
_MOST_FAILURES = 3


class ConfigurationError(MisconfigurationException, ValueError):
    """The callback cannot work as it was set up; the message says what to change."""


class GMARCallback(Callback):
    """Watch a Vision Transformer while it trains: heatmaps, head importance, heads that collapse.

    A fixed, class-balanced batch of validation images is explained before the first optimizer step, at every
    interval and at the end. Training is not disturbed: with and without the callback, the final weights are
    bit-identical.

    What is logged, all with the x-axis of Lightning's own training rows:

    | key | what |
    |---|---|
    | `gmar/heatmaps` | overlays of `num_heatmaps` probe images, in fixed order |
    | `gmar/inputs` | the same photographs without heat, once |
    | `gmar/head_importance` | layers x heads, shares of the layer; flagged heads are crossed |
    | `gmar/head_evolution` | every head over the whole run so far |
    | `gmar/importance` | histogram of all shares |
    | `gmar/collapsed_heads`, `gmar/newly_collapsed` | heads flagged now, heads flagged by this probe |
    | `gmar/effective_heads` | heads that share a layer's importance, mean over layers |
    | `gmar/importance_min` | share of the weakest head, 1 is fair |
    | `gmar/attention_entropy` | mean normalised entropy of attention |
    | `gmar/heatmap_drift`, `gmar/heatmap_drift_from_first` | 1 - rank correlation with earlier maps |
    | `gmar/compute_seconds` | what the probe took |
    | `gmar_layers/..._L00` | effective heads, importance and entropy per layer |
    | `gmar_heads/L00_H00` | relative share per head, with `log_per_head=True` |

    Args:
        every_n_train_steps: Probe whenever this many more optimizer steps were taken; 100 when neither
            interval is given.
        every_n_epochs: Probe after every so-manieth epoch instead.
        num_images: Probe size, drawn class-balanced from the validation set, fixed for the run.
        num_heatmaps: How many of them are drawn.
        probe_batch: Your own `(images, labels)`, or a mapping with `images` and optionally `labels`.
        module: Dotted path of the classifier inside the LightningModule; None calls its forward.
        target: The explained class: "predicted", "label", or a class index.
        norm: "l1", "l2" or "uniform", see `gmar`.
        rollout: "paper", "flow", "gradient" or "last_layer", see `gmar`.
        residual: Weight of the residual path, 1 when None.
        micro_batch_size: Images per forward; None takes the whole probe at once.
        detector: The collapse detector; None switches it off.
        on_collapse: What to do when heads collapse: "warn", "alert" (W&B alert too), "stop" (graceful), or a
            callable `(trainer, pl_module, events)`, called on every process.
        confirm: Measure by ablation what newly flagged heads still contribute: two forwards over the probe
            images at probes that flag, none at others.
        on_error: "warn" lets training go on after a failed probe, "raise" does not.
        mean: Channel means for display; found from the datamodule, the module or timm when possible.
        std: Channel standard deviations, likewise.
        class_names: For captions; found likewise.
        log_per_head: One scalar per head, hidden from automatic panels.
        max_events: Pictures of at most so many probes are logged; scalars always are.
        save_dir: Local record; `<trainer log dir>/gmar` when None.

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
        target: Literal["predicted", "label"] | int = "predicted",
        norm: Norm = "l1",
        rollout: Rollout = "paper",
        residual: float | None = None,
        micro_batch_size: int | None = None,
        detector: CollapseDetector | Literal["default"] | None = "default",
        on_collapse: Literal["warn", "alert", "stop"] | Callable[..., None] = "alert",
        confirm: bool = True,
        on_error: Literal["warn", "raise"] = "warn",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        class_names: Sequence[str] | None = None,
        log_per_head: bool = False,
        max_events: int = 100,
        save_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__()
        if every_n_train_steps is None and every_n_epochs is None:
            every_n_train_steps = 100
        try:
            self._schedule = Every(steps=every_n_train_steps, epochs=every_n_epochs)
            check_form(norm, rollout, residual, micro_batch_size)
            self._given = None if probe_batch is None else ProbeBatch(*_given_batch(probe_batch))
        except ValueError as error:
            raise ConfigurationError(str(error)) from None
        _check_counts(num_images=num_images, num_heatmaps=num_heatmaps, max_events=max_events)
        _check_choice("on_error", on_error, ("warn", "raise"))
        if not callable(on_collapse):
            _check_choice("on_collapse", on_collapse, ("warn", "alert", "stop"), "or a callable")
        if isinstance(target, bool) or not (isinstance(target, int) and target >= 0):
            _check_choice("target", target, ("predicted", "label"), "or a class index")
        if target == "label" and self._given is not None and self._given.labels is None:
            raise ConfigurationError('target="label" needs labels: pass probe_batch=(images, labels)')
        self.num_images, self.num_heatmaps, self.max_events = num_images, num_heatmaps, max_events
        self.module, self.target, self.micro_batch_size = module, target, micro_batch_size
        self.norm: Norm = norm
        self.rollout: Rollout = rollout
        self.residual = residual
        self.on_collapse, self.confirm, self.on_error = on_collapse, confirm, on_error
        self.mean, self.std, self.class_names = mean, std, class_names
        self.log_per_head, self.save_dir = log_per_head, save_dir
        self.detector = CollapseDetector() if detector == "default" else detector
        self._fresh_detector = copy.deepcopy(self.detector)
        self._explain = functools.partial(gmar, norm=norm, rollout=rollout, residual=residual, module=module)
        self._restored: dict[str, Any] | None = None
        self._begin_run()

    def _begin_run(self) -> None:
        self._schedule.reset()
        self.detector = copy.deepcopy(self._fresh_detector)
        self._probe: ProbeBatch | None = None
        self._publisher: Publisher | None = None  # on process zero only
        self._last_probe: tuple[int, int] | None = None  # (optimizer steps, logger's x)
        self._probes = self._failed = self._failed_in_a_row = 0
        self._probe_seconds, self._fit_started = 0.0, time.monotonic()
        self._folder: str | None = None
        self._fingerprint: str | None = None
        self._nonfinite, self._closed = False, False
        self._said: set[str] = set()

    @property
    def state_key(self) -> str:
        """Tells apart several callbacks in one trainer."""
        return self._generate_state_key(
            unit=self._schedule.unit,
            interval=self._schedule.interval,
            num_images=self.num_images,
            module=self.module,
            target=self.target,
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
        try:
            classifier_of(pl_module, self.module)
        except ValueError as error:
            raise ConfigurationError(str(error)) from None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the probe images, open or continue the record, and probe the untrained model."""
        restored, self._restored = self._restored, None
        if restored is not None or trainer.global_step == 0:
            self._begin_run()
        if restored is not None:
            self._continue_from(restored)
        self._fit_started, self._closed = time.monotonic(), False
        self._probe = self._drawn(trainer, pl_module)
        self._open_record(trainer, pl_module, resumed=restored is not None)
        if self._last_probe is None:
            started_at = trainer.global_step if self._schedule.unit == "step" else trainer.current_epoch
            self._schedule.reset(started_at)
            self._run_probe(trainer, pl_module, log_position(trainer), first=True)

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
            self._say_once(
                "GMARCallback: an epoch went by and Lightning counted no optimizer step (optimizers stepped by "
                "hand?); use every_n_epochs"
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Probe the trained model, write the report, and say what the run was."""
        position = log_position(trainer, ended=True)
        if self._last_probe is not None and self._last_probe[0] != trainer.global_step:
            position = max(position, self._last_probe[1] + 1)
        self._run_probe(trainer, pl_module, position)
        self._close(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the record cleanly when training stops early, by Ctrl-C or by an error."""
        self._close(trainer)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as plain values."""
        return {
            "schedule": self._schedule.state_dict(),
            "last_probe": list(self._last_probe or ()),
            "detector": None if self.detector is None else self.detector.state_dict(),
            "fingerprint": self._fingerprint,
            "folder": self._folder,
            "probes": self._probes,
            "probe_seconds": self._probe_seconds,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue a run; takes effect when training starts."""
        self._restored = dict(state_dict)

    def _continue_from(self, state: Mapping[str, Any]) -> None:
        self._schedule.load_state_dict(state["schedule"])
        self._last_probe = (state["last_probe"][0], state["last_probe"][1]) if state["last_probe"] else None
        if self.detector is not None and state["detector"] is not None:
            self.detector.load_state_dict(state["detector"])
        self._fingerprint, self._folder = state["fingerprint"], state["folder"]
        self._probes, self._probe_seconds = state["probes"], state["probe_seconds"]

    def _drawn(self, trainer: Trainer, pl_module: LightningModule) -> ProbeBatch:
        try:
            probe = self._given or draw_from_validation(trainer, pl_module, self.num_images)
        except ValueError as error:
            raise ConfigurationError(f"GMARCallback: {error}") from None
        if probe is None:
            raise ConfigurationError(
                "GMARCallback found no validation dataloader to draw its images from; add one, or pass "
                "probe_batch=(images, labels)"
            )
        if self._given is None and len(probe) < self.num_images:
            self._say_once(
                f"GMARCallback: num_images={self.num_images}, but the validation set has {len(probe)}; using all"
            )
        if self.target == "label" and probe.labels is None:
            raise ConfigurationError(
                'target="label" needs labels, and the validation batches have none; use target="predicted" or '
                "pass probe_batch=(images, labels)"
            )
        return probe

    def _open_record(self, trainer: Trainer, pl_module: LightningModule, resumed: bool) -> None:
        assert self._probe is not None
        changed = self._fingerprint is not None and self._fingerprint != self._probe.fingerprint
        self._fingerprint = self._probe.fingerprint
        if changed:
            rank_zero_warn(
                "GMARCallback: the validation set gives other probe images than before; the record starts a new "
                "segment"
            )
        folder = Path(self._folder or self.save_dir or default_folder(trainer, self))
        self._folder = str(folder)
        if not trainer.is_global_zero or (self._publisher is not None and not changed):
            return
        on_disk = self.save_dir is not None or not trainer.fast_dev_run
        if not trainer.loggers and on_disk:
            rank_zero_info(f"GMARCallback: no logger; the record goes to {folder}")
        found_mean, found_std = normalisation_of(trainer, pl_module)
        mean, std = self.mean or found_mean, self.std or found_std
        planned = planned_probes(trainer, self._schedule.unit, self._schedule.interval)
        self._publisher = Publisher.open(
            folder if on_disk else None,
            self._probe,
            [enlarged(to_uint8_image(image, mean, std)) for image in self._probe.images[: self.num_heatmaps]],
            trainer.loggers,
            names=self.class_names or class_names_of(trainer, pl_module),
            settings=self._settings(),
            resume_at=trainer.global_step if resumed else None,
            per_head=self.log_per_head,
            media_every=max(1, math.ceil((planned or 0) / self.max_events)),
            warn=rank_zero_warn,
        )

    def _settings(self) -> dict[str, Any]:
        return {
            "every": f"{self._schedule.interval} {self._schedule.unit}s",
            "num_images": self.num_images,
            "num_heatmaps": self.num_heatmaps,
            "module": self.module,
            "target": self.target,
            "norm": self.norm,
            "rollout": self.rollout,
            "residual": 1.0 if self.residual is None else self.residual,
        }

    def _run_probe(
        self, trainer: Trainer, pl_module: LightningModule, step: int, first: bool = False
    ) -> None:
        last = self._last_probe
        repeats = last is not None and (trainer.global_step == last[0] or step <= last[1])
        spent = self._failed_in_a_row >= _MOST_FAILURES or (trainer.fast_dev_run and not first)
        if self._probe is None or repeats or spent:
            return
        started = time.monotonic()
        self._last_probe = (trainer.global_step, step)
        self._probes += 1
        where = {"step": step, "global_step": trainer.global_step, "epoch": trainer.current_epoch}
        metrics, events = logged_metrics(trainer), []
        try:
            with silent(pl_module):
                found = self._measured(trainer, pl_module)
                events = self._judged(trainer, pl_module, step, found)
            flagged = self.detector.flagged if self.detector is not None else []
            record, heatmaps, layers = probe_record(found, events, flagged), found.heatmaps, found.layers
            self._failed_in_a_row = 0
        except Exception as error:
            if self.on_error == "raise" or (first and isinstance(error, (UnsupportedModelError, ValueError))):
                raise
            self._note_failure(error, step)
            record, heatmaps, layers = failure_record(error), None, ()
        record = {**where, **record, "metrics": metrics, "seconds": time.monotonic() - started}
        if heatmaps is not None:
            trainer.callback_metrics.update(as_metrics(record))
        if self._publisher is not None:
            self._publisher.add(record, heatmaps, layers)
        self._react(trainer, pl_module, events)
        self._probe_seconds += time.monotonic() - started

    def _measured(self, trainer: Trainer, pl_module: LightningModule) -> Measurement:
        assert self._probe is not None
        return measure(
            callable_model(trainer, pl_module),
            self._probe,
            self._explain,
            target=self.target,
            micro_batch_size=self.micro_batch_size,
            precision=trainer.precision_plugin.forward_context,
        )

    def _judged(
        self, trainer: Trainer, pl_module: LightningModule, step: int, found: Measurement
    ) -> list[HeadEvent]:
        if self.detector is None or self._probe is None:
            return []
        events = self.detector.update(step, found.importance, found.layers)
        if not self.confirm:
            return events
        try:
            return confirm_by_ablation(
                callable_model(trainer, pl_module),
                self._probe,
                found,
                events,
                self.detector.flagged,
                module=self.module,
                precision=trainer.precision_plugin.forward_context,
            )
        except Exception as error:
            self._say_once(f"GMARCallback: flags could not be confirmed by ablation ({error})", "confirm")
            return events

    def _note_failure(self, error: Exception, step: int) -> None:
        self._failed += 1
        self._failed_in_a_row += 1
        cause = f"{type(error).__name__}: {error}"
        self._say_once(f"GMARCallback: the probe at step {step} failed, training goes on ({cause})", cause)
        if self._failed_in_a_row == _MOST_FAILURES:
            self._say_once(
                f"GMARCallback: {_MOST_FAILURES} probes in a row failed; no more probes in this run",
                "disabled",
            )

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
                if self.on_error == "raise":
                    raise
                self._say_once(f"GMARCallback: on_collapse raised {type(error).__name__}: {error}")
            return
        text = alarm_text(alarms)
        rank_zero_warn(f"GMARCallback: {text}")
        if self.on_collapse in ("alert", "stop") and self._publisher is not None:
            self._publisher.alert("GMAR: attention heads", text)
        if self.on_collapse == "stop":
            trainer.should_stop = True

    def _close(self, trainer: Trainer) -> None:
        if self._closed or self._publisher is None or not trainer.is_global_zero:
            return
        self._closed = True
        lines = self._publisher.close(
            metrics=logged_metrics(trainer),
            counts=(self._probes, self._failed),
            seconds=(self._probe_seconds, time.monotonic() - self._fit_started),
        )
        trainer.print("\n".join(lines))

    def _say_once(self, sentence: str, key: str | None = None) -> None:
        if (key or sentence) not in self._said:
            self._said.add(key or sentence)
            rank_zero_warn(sentence)


def _given_batch(batch: Any) -> tuple[Tensor, Tensor | None]:
    images, labels = unpack_batch(batch)
    kept = images.detach().cpu().clone()
    return kept, None if labels is None else labels.detach().cpu().clone()


def _check_counts(**counts: Any) -> None:
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigurationError(f"{name} must be a whole number >= 1, got {value!r}")


def _check_choice(name: str, value: Any, allowed: tuple[str, ...], other: str = "") -> None:
    if value not in allowed:
        choices = ", ".join(map(repr, allowed))
        raise ConfigurationError(f"{name}={value!r} is unknown; choose one of {choices} {other}".rstrip())
