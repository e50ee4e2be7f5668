"""Every question the callback asks of a Trainer: probe images, folder, names, position, the module to run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torchmetrics import Metric

from gmar_lightning.arguments import ConfigurationError
from gmar_lightning.explain.inputs import Inputs
from gmar_lightning.explain.isolation import undisturbed
from gmar_lightning.monitor.probe import ProbeBatch, agreed_probe, draw_probe
from gmar_lightning.monitor.processes import ProbeError
from gmar_lightning.monitor.say import SayOnce
from gmar_lightning.monitor.settings import KnownClasses, ProbeSettings
from gmar_lightning.show.outline import outlined
from gmar_lightning.show.render import enlarged, to_uint8_image


def draw_images(
    trainer: Trainer,
    pl_module: LightningModule,
    given: ProbeBatch | None,
    num_images: int,
    needs_labels: bool,
    say: SayOnce,
    inputs: Inputs = None,
) -> ProbeBatch:
    """The probe images, the user's own or drawn; a `ConfigurationError` without any, or without labels if needed."""
    try:
        probe = given or _draw_from_validation(trainer, pl_module, num_images, inputs)
    except (ValueError, ProbeError) as error:
        raise ConfigurationError(f"GMARCallback: {error}") from error
    if probe is None:
        raise ConfigurationError(
            "GMARCallback found no validation dataloader to draw its images from; add one, or pass "
            "probe_batch=(images, labels)"
        )
    if given is None and len(probe) < num_images:
        say(f"GMARCallback: num_images={num_images}, but the validation set has {len(probe)}; using all")
    if needs_labels and probe.labels is None:
        raise ConfigurationError(
            'target="label" needs labels, and the validation batches have none; use target="predicted" or '
            "pass probe_batch=(images, labels)"
        )
    return probe


def photographs(
    trainer: Trainer,
    pl_module: LightningModule,
    images: Tensor,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    say: SayOnce,
    masks: Tensor | None = None,
) -> list[np.ndarray]:
    """The probe images as they looked before normalisation, uint8; none where they cannot be drawn.

    Where the evidence is known, `masks` `(images, height, width)`, its border is drawn on them.
    """
    known_mean, known_std = normalisation_of(trainer, pl_module)
    try:
        drawn = [enlarged(to_uint8_image(image, mean or known_mean, std or known_std)) for image in images]
        # One mask for each picture that is drawn; there may be more of them.
        return (
            drawn if masks is None else [outlined(*pair) for pair in zip(drawn, masks.numpy(), strict=False)]
        )
    except Exception as error:
        # One process draws; nothing it meets may keep it from the others.
        say(f"GMARCallback: the probe images cannot be drawn ({error}); numbers only")
        return []


def _draw_from_validation(
    trainer: Trainer, pl_module: LightningModule, num_images: int, inputs: Inputs
) -> ProbeBatch | None:
    """The probe images, from the validation set and through the batch-transfer hooks; None without one.

    Raises:
        ValueError: When they cannot be drawn.
        ProbeError: When another process could not.
    """

    def transfer(batch: Any) -> Any:
        return trainer.strategy.batch_to_device(batch, device=pl_module.device, dataloader_idx=0)

    # Hooks that augment only while training must see that this is not training.
    with silenced(trainer, pl_module), undisturbed(pl_module), validating(trainer):
        loader = validation_loader(trainer)
        if loader is None:
            return None
        return agreed_probe(lambda: _drawn(loader, num_images, transfer, inputs))


def _drawn(loader: Any, num_images: int, transfer: Any, inputs: Inputs) -> ProbeBatch:
    try:
        return draw_probe(loader, num_images, transfer, inputs)
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(
            f"the validation images cannot be read ({type(error).__name__}: {error}); "
            "pass probe_batch=(images, labels)"
        ) from error


@contextmanager
def validating(trainer: Trainer) -> Iterator[None]:
    """For hooks that augment only while training: inside, this is validation."""
    stage = trainer.state.stage
    trainer.state.stage = RunningStage.VALIDATING
    try:
        yield
    finally:
        trainer.state.stage = stage


def validation_loader(trainer: Trainer) -> Any:
    """The first validation loader; None without one."""
    loaders = trainer.val_dataloaders
    source = trainer.fit_loop.epoch_loop.val_loop._data_source
    if loaders is None and source.is_defined():
        # limit_val_batches=0 or validation later on: the data set is there all the same.
        loaders = source.dataloader()
    return _first_of(loaders)


def _first_of(loaders: Any) -> Any:
    """The first loader of a collection of them; a list of batches is a loader itself."""
    if isinstance(loaders, CombinedLoader):
        return _first_of(loaders.iterables)
    if isinstance(loaders, Mapping):
        return _first_of(next(iter(loaders.values()), None))
    if isinstance(loaders, Sequence):
        first = loaders[0] if loaders else None
        return _first_of(first) if hasattr(first, "dataset") or not loaders else loaders
    return loaders


def default_folder(trainer: Trainer, callback: Callback) -> Path:
    """`<log dir>/gmar`, beside the checkpoints; `gmar_2` for a second callback of the same kind."""
    alike = _alike(trainer, callback)
    name = "gmar" if alike[0] is callback else f"gmar_{alike.index(callback) + 1}"
    if not trainer.loggers:
        return Path(trainer.default_root_dir) / name
    logger = trainer.loggers[0]
    # Asking a logger for its version may create it, so every process asks; the answer of the first counts.
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    folder = Path(logger.save_dir or trainer.default_root_dir, str(logger.name), version, name)
    return Path(trainer.strategy.broadcast(str(folder)))


def state_of_same_run(
    trainer: Trainer, callback: Callback, checkpoint: Mapping[str, Any]
) -> dict[str, Any] | None:
    """The state in a checkpoint of this callback when it was set up otherwise; None where there is no doubt.

    Lightning matches states by settings. A run that goes on with another interval, in another folder, or under
    another default, is still the same run, as long as there is one callback of this kind on both sides.
    """
    states = checkpoint.get("callbacks", {})
    ours = [state for key, state in states.items() if key.startswith(type(callback).__qualname__)]
    unmatched = callback.state_key not in states and len(_alike(trainer, callback)) == 1
    return ours[0] if unmatched and len(ours) == 1 else None


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """The trainer's callbacks, in their order."""
    # Lightning sets this attribute in its callback connector, where type checkers do not see it.
    return getattr(trainer, "callbacks")  # noqa: B009


def _alike(trainer: Trainer, callback: Callback) -> list[Callback]:
    return [other for other in callbacks_of(trainer) if type(other) is type(callback)]


def callable_model(trainer: Trainer, pl_module: LightningModule) -> nn.Module:
    """The module whose forward may be called from a hook.

    Under FSDP (version 1) the wrapper, which can gather the weights; every other strategy answers to the plain
    module, and a wrapped DDP module must not be called outside of training.
    """
    wrapper = trainer.strategy.model
    return wrapper if wrapper is not None and _is_wrapped_by_fsdp(trainer) else pl_module


def _is_wrapped_by_fsdp(trainer: Trainer) -> bool:
    return type(trainer.strategy.model).__name__ == "FullyShardedDataParallel"


def is_smoke_test(trainer: Trainer) -> bool:
    """Whether this is a `fast_dev_run`: one probe, no record."""
    return bool(getattr(trainer, "fast_dev_run", False))


def ends_here(trainer: Trainer) -> bool:
    """Whether the run is expected to end with the batch that was just trained on, as far as that can be known."""
    if trainer.should_stop or (trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps):
        return True
    epochs = trainer.max_epochs
    return epochs is not None and 0 <= epochs <= trainer.current_epoch + 1 and trainer.is_last_batch


def log_position(trainer: Trainer, ended: bool = False) -> int:
    """The x of Lightning's own training rows: the 0-based index of the last batch that stepped."""
    stepped = trainer.fit_loop.epoch_loop._batches_that_stepped
    return max(0, stepped - 1) if ended else stepped


def logged_metrics(trainer: Trainer) -> dict[str, float]:
    """What the trainer has logged so far, without this package's own numbers."""
    return {
        name: float(value)
        for name, value in trainer.callback_metrics.items()
        if not name.startswith("gmar") and _is_number(value)
    }


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex()
    return isinstance(value, (int, float))


def planned_probes(trainer: Trainer, unit: str, interval: int) -> int | None:
    """How many probes the run will take, as far as that can be known.

    Counted by hand: `Trainer.estimated_stepping_batches` may load data, and only one process asks.
    """
    epochs = trainer.max_epochs if trainer.max_epochs is not None and trainer.max_epochs > 0 else math.inf
    total = float(epochs)
    if unit == "step":
        total *= math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        total = min(total, trainer.max_steps) if trainer.max_steps > 0 else total
    return 2 + int(total) // interval if math.isfinite(total) else None


def normalisation_of(trainer: Trainer, pl_module: LightningModule) -> tuple[Any, Any]:
    """Mean and standard deviation that the images were normalised with, where somebody says so."""
    for holder in (getattr(trainer, "datamodule", None), pl_module):
        mean, std = getattr(holder, "mean", None), getattr(holder, "std", None)
        if _is_channel_list(mean) and _is_channel_list(std):
            return mean, std
    for module in pl_module.modules():
        config = getattr(module, "pretrained_cfg", None)
        if isinstance(config, dict) and config.get("mean") and config.get("std"):
            return config["mean"], config["std"]
    return None, None


def settings_of_run(trainer: Trainer, pl_module: LightningModule, settings: ProbeSettings) -> ProbeSettings:
    """The callback's settings with what this trainer and this module add to them."""
    context = trainer.precision_plugin.forward_context  # of this trainer, one of several perhaps
    return replace(settings, precision=context, known=known_classes(trainer, pl_module))


def known_classes(trainer: Trainer, pl_module: LightningModule) -> KnownClasses:
    """How many classes there are, and what the scores are, by metrics, losses, settings, data and names."""
    own = {"hparams": pl_module.hparams, type(pl_module).__name__: pl_module}
    own |= {path: module for path, module in pl_module.named_modules() if isinstance(module, Metric)}
    firm = {name: count for name, holder in own.items() if (count := _count_of(holder)) is not None}
    data = {"the datamodule": _count_of(getattr(trainer, "datamodule", None))}
    data["class_names"] = len(class_names_of(trainer, pl_module) or ()) or None
    soft = {name: count for name, count in data.items() if count is not None}
    kinds = {type(module).__name__ for module in pl_module.modules()}
    several = any(kind.startswith("Multilabel") for kind in kinds)
    one = any(kind.startswith("Multiclass") for kind in kinds) or "CrossEntropyLoss" in kinds
    output = (
        "multilabel" if several or ("BCEWithLogitsLoss" in kinds and not one) else "logits" if one else None
    )
    return KnownClasses({**soft, **firm}, frozenset(firm), output)


def _count_of(holder: Any) -> int | None:
    """The number of classes that something names as its own."""
    for name in ("num_classes", "n_classes", "num_labels"):
        value = holder.get(name) if isinstance(holder, Mapping) else getattr(holder, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def _is_channel_list(value: Any) -> bool:
    return (
        isinstance(value, (list, tuple)) and bool(value) and all(isinstance(v, (int, float)) for v in value)
    )


def class_names_of(trainer: Trainer, pl_module: LightningModule) -> list[str] | None:
    """Names of the classes, from the datamodule, the module or the data set."""
    dataset = getattr(validation_loader(trainer), "dataset", None)
    while dataset is not None and hasattr(dataset, "dataset"):
        dataset = dataset.dataset
    for holder, name in (
        (getattr(trainer, "datamodule", None), "class_names"),
        (pl_module, "class_names"),
        (dataset, "classes"),
    ):
        found = getattr(holder, name, None)
        if isinstance(found, (list, tuple)) and found:
            return [str(entry) for entry in found]
    return None


@contextmanager
def silenced(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """Let what a forward logs go nowhere: through `self.log` and through the loggers themselves."""
    own = {name: value for name, value in vars(pl_module).items() if name in ("log", "log_dict")}
    loggers = trainer.loggers
    vars(pl_module).update(log=_log_nothing, log_dict=_log_nothing)
    trainer.loggers = [DummyLogger() for _ in loggers]
    try:
        yield
    finally:
        trainer.loggers = loggers
        for name in ("log", "log_dict"):
            vars(pl_module).pop(name, None)
        vars(pl_module).update(own)


def state_of_run(trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
    """Where the state lies that a probe must not change, by name."""
    optimizers = {f"optimizer[{index}]": each for index, each in enumerate(trainer.optimizers)}
    roots = {type(pl_module).__name__: pl_module, **optimizers}
    # A LightningDataModule that holds its trainer is walked like any object of the user's.
    datamodule = getattr(trainer, "datamodule", None)
    return roots if datamodule is None else {**roots, type(datamodule).__name__: datamodule}


def not_state(trainer: Trainer) -> tuple[Any, ...]:
    """What belongs to Lightning, and is neither walked nor copied."""
    return (trainer, trainer.strategy, *trainer.loggers)


def _log_nothing(*_: Any, **__: Any) -> None: ...
