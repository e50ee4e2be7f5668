"""A ViT of a few thousand weights, 32 random images, and the state of a whole run as a few digests."""

from __future__ import annotations

import copy
import hashlib
import pickle
import random
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from gmar_lightning.callback import GMARCallback

CLASSES, SIZE = 4, 16


def vit(**changes: Any) -> nn.Module:
    """4 patches, 2 layers of 2 heads."""
    settings = {"img_size": SIZE, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    return timm.models.VisionTransformer(**{**settings, "num_classes": CLASSES, **changes})


def images_of(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


class Images(Dataset):
    """Image, label and index; says its labels up front only when asked to."""

    def __init__(self, count: int = 32, seed: int = 0, says_labels: bool = False):
        self.images, self.classes = images_of(count, seed), torch.arange(count) % CLASSES
        if says_labels:
            self.targets = self.classes.tolist()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        return self.images[index], self.classes[index], index


def loaders(train: int = 32, val: int = 16, **settings: Any) -> tuple[DataLoader, DataLoader]:
    return (
        DataLoader(Images(train), 4, shuffle=True, **settings),
        DataLoader(Images(val, seed=1), 8, **settings),
    )


class Classifier(LightningModule):
    """Trains `vit` with AdamW and a schedule; remembers the samples it was given."""

    def __init__(self, **changes: Any):
        super().__init__()
        self.net = vit(**changes)
        self.order = Order()

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        self.order.add(batch[2])
        loss = functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        logits = self(batch[0])
        self.log("val/loss", functional.cross_entropy(logits, batch[1]))
        self.log("val/accuracy", (logits.argmax(-1) == batch[1]).float().mean())

    def test_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), 1e-3)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Order:
    """The training samples, in the order they came."""

    def __init__(self) -> None:
        self.indices: list[int] = []

    def add(self, indices: Tensor) -> None:
        self.indices += indices.tolist()


class Rows(Logger):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    @property
    def name(self) -> str:
        return "rows"

    @property
    def version(self) -> int:
        return 0

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        return None

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))

    def of_training(self) -> list[Any]:
        own = [(step, {k: v for k, v in row.items() if not k.startswith("gmar")}) for step, row in self.rows]
        return [(step, sorted(row.items())) for step, row in own if set(row) - {"epoch"}]

    def of_gmar(self) -> list[tuple[int | None, dict[str, float]]]:
        return [(step, row) for step, row in self.rows if "gmar/collapsed_heads" in row]


def fit(
    folder: Path,
    module: LightningModule,
    data: Any,
    *,
    callbacks: Sequence[Any] = (),
    ckpt_path: str | None = None,
    **settings: Any,
) -> tuple[Trainer, Rows]:
    """Train on the CPU without output; returns the trainer and what was logged."""
    rows = Rows()
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "log_every_n_steps": 1,
        "logger": rows,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "default_root_dir": folder,
    }
    trainer = Trainer(callbacks=list(callbacks), **{**defaults, **settings})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*`num_workers`.*|.*log_every_n_steps.*")
        if isinstance(data, tuple):
            trainer.fit(module, *data, ckpt_path=ckpt_path)
        else:
            trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return trainer, rows


def state_of(trainer: Trainer, module: LightningModule, rows: Rows) -> dict[str, str]:
    """Digests of everything a callback could disturb."""
    order = getattr(module, "order", None)
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {
        "weights and buffers": digest(module.state_dict()),
        "gradients": digest([parameter.grad for parameter in module.parameters()]),
        "optimizers": digest([optimizer.state_dict() for optimizer in trainer.optimizers]),
        "schedulers": digest([config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]),
        "torch random state": digest([torch.get_rng_state(), *cuda]),
        "numpy random state": digest(np.random.get_state()),
        "python random state": digest(random.getstate()),
        "logged metrics": digest(rows.of_training()),
        "training metrics": digest(
            sorted((k, float(v)) for k, v in trainer.logged_metrics.items() if not k.startswith("gmar"))
        ),
        "sample order": digest(order.indices if order is not None else None),
        "modes": digest([sub.training for sub in module.modules()]),
        "frozen": digest([parameter.requires_grad for parameter in module.parameters()]),
        "progress": digest([trainer.global_step, trainer.current_epoch, trainer.fit_loop.total_batch_idx]),
    }


def digest(value: Any) -> str:
    """Digest of nested containers of tensors and plain values; bit for bit."""
    return hashlib.sha256(pickle.dumps(_plain(copy.copy(value)))).hexdigest()[:12]


def _plain(value: Any) -> Any:
    if hasattr(value, "to_local"):
        value = value.to_local()  # this process's part of a sharded tensor
    if isinstance(value, Tensor):
        raw = value.detach().cpu().contiguous()
        return str(raw.dtype), tuple(raw.shape), raw.flatten().view(torch.uint8).numpy().tobytes()
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, dict):
        return [(str(key), _plain(item)) for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return repr(value)


def watcher(folder: Path, **changes: Any) -> GMARCallback:
    """A callback that probes often and hides no error."""
    settings = {"every_n_train_steps": 3, "num_images": 8, "num_heatmaps": 2, "save_dir": folder / "gmar"}
    return GMARCallback(**{**settings, "on_error": "raise", **changes})


def run_and_digest(
    folder: Path,
    make_module: Callable[[], LightningModule],
    make_data: Callable[[], Any],
    callbacks: Callable[[], Sequence[Any]] = list,
    **settings: Any,
) -> tuple[dict[str, str], Trainer, Rows]:
    """One seeded run from scratch."""
    seed_everything(7, workers=True, verbose=False)
    module, data = make_module(), make_data()
    trainer, rows = fit(folder, module, data, callbacks=callbacks(), **settings)
    return state_of(trainer, module, rows), trainer, rows
