"""What the callback asks of a Trainer: data, folder, names, precision, the module to run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import RunningStage
from torch import Tensor, nn

from gmar_lightning.explain.isolation import isolated_random_state
from gmar_lightning.monitor.probe import ProbeBatch, draw_probe

__all__ = [
    "callable_model",
    "class_names_of",
    "default_folder",
    "draw_from_validation",
    "log_position",
    "logged_metrics",
    "normalisation_of",
    "planned_probes",
    "silent",
]


def draw_from_validation(trainer: Trainer, pl_module: LightningModule, num_images: int) -> ProbeBatch | None:
    """The probe images, from the validation set and through the batch-transfer hooks; None without one."""
    loader = _validation_loader(trainer)
    if loader is None:
        return None

    def transfer(batch: Any) -> Any:
        # Hooks that augment only while training must see that this is not training.
        with mock.patch.object(trainer.state, "stage", RunningStage.VALIDATING):
            return trainer.strategy.batch_to_device(batch, device=pl_module.device, dataloader_idx=0)

    return draw_probe(loader, num_images, transfer)


def _validation_loader(trainer: Trainer) -> Any:
    loaders = trainer.val_dataloaders
    source = trainer.fit_loop.epoch_loop.val_loop._data_source
    if loaders is None and source.is_defined():
        # limit_val_batches=0 or validation later on: the data set is there all the same.
        with isolated_random_state():
            loaders = source.dataloader()
    while isinstance(loaders, dict) and loaders:
        loaders = next(iter(loaders.values()))
    if isinstance(loaders, (list, tuple)) and loaders and hasattr(loaders[0], "dataset"):
        loaders = loaders[0]
    return loaders if loaders is not None and not (isinstance(loaders, Sequence) and not loaders) else None


def default_folder(trainer: Trainer, callback: Callback) -> Path:
    """`<log dir>/gmar`, beside the checkpoints; `gmar_2` for a second callback of the same kind."""
    alike = [other for other in trainer.callbacks if type(other) is type(callback)]
    name = "gmar" if alike[0] is callback else f"gmar_{alike.index(callback) + 1}"
    if not trainer.loggers:
        return Path(trainer.default_root_dir) / name
    logger = trainer.loggers[0]
    # Asking a logger for its version may create it, so every process asks; the answer of the first counts.
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    folder = Path(logger.save_dir or trainer.default_root_dir, str(logger.name), version, name)
    return Path(trainer.strategy.broadcast(str(folder)))


def callable_model(trainer: Trainer, pl_module: LightningModule) -> nn.Module:
    """The module whose forward may be called from a hook.

    FSDP (version 1) gathers its parameters in the wrapper's forward only; every other strategy answers to
    the plain module, and a wrapped DDP module must not be called outside of training.
    """
    wrapper = trainer.strategy.model
    if wrapper is not None and type(wrapper).__name__ == "FullyShardedDataParallel":
        return wrapper
    return pl_module


def log_position(trainer: Trainer, ended: bool = False) -> int:
    """The x of Lightning's own training rows: the 0-based index of the last batch that stepped."""
    stepped = trainer.fit_loop.epoch_loop._batches_that_stepped
    return max(0, stepped - 1) if ended else stepped


def logged_metrics(trainer: Trainer) -> dict[str, float]:
    """What the trainer has logged so far, without this package's own numbers."""
    return {
        name: float(value)
        for name, value in trainer.callback_metrics.items()
        if isinstance(value, (int, float, Tensor)) and not name.startswith("gmar") and _is_single(value)
    }


def _is_single(value: Any) -> bool:
    return not isinstance(value, Tensor) or value.numel() == 1


def planned_probes(trainer: Trainer, unit: str, interval: int) -> int | None:
    """How many probes the run will take, as far as that can be known."""
    total = trainer.estimated_stepping_batches if unit == "step" else (trainer.max_epochs or -1)
    return 2 + int(total) // interval if total > 0 and not math.isinf(total) else None


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


def _is_channel_list(value: Any) -> bool:
    return (
        isinstance(value, (list, tuple)) and bool(value) and all(isinstance(v, (int, float)) for v in value)
    )


def class_names_of(trainer: Trainer, pl_module: LightningModule) -> list[str] | None:
    """Names of the classes, from the datamodule, the module or the data set."""
    dataset = getattr(_validation_loader(trainer), "dataset", None)
    while hasattr(dataset, "dataset"):
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
def silent(pl_module: LightningModule) -> Iterator[None]:
    """Keep a forward that logs from adding the probe's values to the training metrics."""
    with ExitStack() as stack:
        for name in ("log", "log_dict"):
            stack.enter_context(mock.patch.object(pl_module, name, _log_nothing))
        yield


def _log_nothing(*args: Any, **kwargs: Any) -> None:
    return None
