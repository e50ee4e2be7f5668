"""With the callback and without it: the same run, bit for bit."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    Timer,
)
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset

from gmar_lightning import History
from gmar_lightning.callback import GMARCallback
from tests.helpers.tiny import CLASSES, Classifier, Images, images_of, loaders, run_and_digest, watcher


@dataclass
class Row:
    """One kind of training: what differs from the plain one."""

    module: Callable[[], LightningModule] = Classifier
    data: Callable[[], Any] = loaders
    trainer: dict[str, Any] = field(default_factory=dict)
    callbacks: Callable[[], Sequence[Callback]] = list
    watch: Callable[[Path], Sequence[GMARCallback]] = lambda folder: [watcher(folder)]
    probes: int = 4
    failed: int = 0
    last: bool = False  # whether the watchers come after the row's own callbacks


class Regularised(Classifier):
    """Dropout, stochastic depth and patch dropout."""

    def __init__(self):
        super().__init__(drop_rate=0.2, attn_drop_rate=0.2, drop_path_rate=0.3, patch_drop_rate=0.5)


class BatchNormHead(Classifier):
    def __init__(self):
        super().__init__()
        self.net.head = nn.Sequential(nn.BatchNorm1d(16), nn.Linear(16, CLASSES))


class FrozenBlock(Classifier):
    """The user's frozen block stays in eval; its dropout and norm would act up if somebody called train()."""

    def __init__(self):
        super().__init__(drop_path_rate=0.5)
        self.net.blocks[0].requires_grad_(False)
        self.net.blocks[0].eval()
        self.net.blocks[1].drop_path1.eval()


class Compiled(Classifier):
    def __init__(self, backend: str = "eager", per_block: bool = False):
        super().__init__(drop_rate=0.1)
        if per_block:
            for block in self.net.blocks:
                block.compile(backend=backend)
        else:
            self.net = torch.compile(self.net, backend=backend)


class Checkpointed(Classifier):
    def __init__(self):
        super().__init__(drop_rate=0.1)
        self.net.set_grad_checkpointing(True)


class TwoOptimizers(Classifier):
    """Manual optimization; the body is stepped every second batch."""

    def __init__(self):
        super().__init__(drop_rate=0.1)
        self.automatic_optimization = False

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        self.order.add(batch[2])
        body, head = self.optimizers()
        loss = functional.cross_entropy(self(batch[0]), batch[1])
        self.manual_backward(loss)
        head.step()
        head.zero_grad()
        if batch_idx % 2:
            body.step()
            body.zero_grad()
        self.log("train/loss", loss)

    def configure_optimizers(self) -> Any:
        head = list(self.net.head.parameters())
        body = [p for name, p in self.net.named_parameters() if not name.startswith("head")]
        return [torch.optim.AdamW(body, 1e-3), torch.optim.SGD(head, 1e-2, momentum=0.9)]


class LogsInForward(Classifier):
    """Everything a forward should not do: logs, counts, keeps features, reassigns a buffer, draws numbers."""

    def __init__(self):
        super().__init__()
        self.register_buffer("centre", torch.zeros(CLASSES))
        self.register_buffer("calls", torch.zeros(()))
        self.count, self.seen, self.stats = 0, [], {}

    def forward(self, images: Tensor) -> Tensor:
        logits = self.net(images)
        self.log("logit_mean", logits.mean(), on_step=False, on_epoch=True)
        self.log_dict({"logit_max": logits.max()}, on_step=False, on_epoch=True)
        self.count += 1
        self.calls += 1
        self.seen.append(len(images))
        self.stats["last"] = float(logits.detach().sum())
        noise = torch.randn(()) * 1e-3 + np.random.rand() * 1e-3 + random.random() * 1e-3
        self.centre = 0.9 * self.centre + 0.1 * logits.detach().mean(0)
        return logits + noise + 1e-3 * self.count + 1e-3 * len(self.seen) + 1e-3 * self.stats["last"]


class DrawsNumbers(Callback):
    """Adds what it draws from every random stream to a weight."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        drawn = torch.rand(()) + np.random.rand() + random.random()
        with torch.no_grad():
            pl_module.net.head.bias.add_(1e-4 * drawn)


class StopsEarly(Callback):
    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        trainer.should_stop = trainer.global_step >= 7


class SevenSteps(Timer):
    """What `max_time` adds to a trainer, with a clock that ticks once a step."""

    def __init__(self):
        super().__init__(duration={"seconds": 7})
        self.trainer: Any = None

    def on_train_batch_end(self, trainer: Any, *args: Any, **kwargs: Any) -> None:
        self.trainer = trainer
        super().on_train_batch_end(trainer, *args, **kwargs)

    def time_elapsed(self, stage: Any = "train") -> float:
        return float(self.trainer.global_step) if self.trainer else 0.0


class Stream(IterableDataset):
    """A stream with a random state of its own and a position that moves."""

    def __init__(self, count: int = 16):
        self.count, self.noise, self.passes = count, np.random.default_rng(3), 0

    def __iter__(self) -> Any:
        self.passes += 1
        for index in range(self.count):
            shift = float(self.noise.normal()) + 0.1 * self.passes
            yield images_of(1, index)[0] + shift, index % CLASSES, index


class Augmented(Images):
    """Augments with a random generator of its own and counts what it was asked, as many libraries do."""

    def __init__(self, count: int = 16, transform: Callable[[Tensor], Tensor] = lambda image: 2 * image):
        super().__init__(count)
        self.draw, self.asked, self.transform = np.random.default_rng(5), [0], transform

    def __getitem__(self, index: int) -> Any:
        self.asked[0] += 1
        return (
            self.transform(self.images[index]) + float(self.draw.normal()) + 0.1 * self.asked[0],
            self.classes[index],
            index,
        )


def shared_data() -> tuple[DataLoader, DataLoader]:
    """Training and validation read one data set, and with it one random generator."""
    both = Augmented(32)
    return (
        DataLoader(torch.utils.data.Subset(both, range(16)), 4, shuffle=True),
        DataLoader(torch.utils.data.Subset(both, range(16, 32)), 8),
    )


def streamed() -> tuple[DataLoader, DataLoader]:
    return DataLoader(Images(), 4, shuffle=True), DataLoader(Stream(), 8)


class Dictionaries(Classifier):
    """Hugging Face style batches, moved and augmented by the module's own hooks."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return {**batch, "pixel_values": batch["pixel_values"] + 0.1 * torch.randn(1)}

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if self.training:
            batch["pixel_values"] = batch["pixel_values"].flip(-1) + torch.rand(1)
        return batch

    def _parts(self, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return batch["pixel_values"], batch["labels"], batch["index"]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(self._parts(batch), batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(self._parts(batch), batch_idx)


def as_dictionaries(items: list[Any]) -> dict[str, Tensor]:
    images, labels, indices = zip(*items, strict=True)
    return {
        "labels": torch.stack(labels),
        "pixel_values": torch.stack(images),
        "index": torch.tensor(indices),
    }


class TwoValidationSets(Classifier):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        super().validation_step(batch, batch_idx)


class Combined(Classifier):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch["a"], batch_idx)


class Module(LightningDataModule):
    """A data module that makes its loaders anew each epoch."""

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Images(), 4, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(torch.utils.data.random_split(Images(32, seed=1), [16, 16])[0], 8)


class Flaky:
    """Makes every second probe fail inside the model; validation is left alone."""

    def __init__(self) -> None:
        self.probes = ctypes.c_int(0)  # memory that a probe does not put back

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        if torch.is_grad_enabled() and not module.training:
            self.probes.value += 1
            torch.rand(3), np.random.rand(), random.random()
            if self.probes.value % 2 == 0:
                raise RuntimeError("a probe that fails")


class FailingProbes(Classifier):
    def __init__(self):
        super().__init__(drop_rate=0.1)
        self.net.blocks[1].register_forward_pre_hook(Flaky())


def accumulated(**more: Any) -> dict[str, Any]:
    return {"accumulate_grad_batches": 3, **more}


def two_watchers(folder: Path) -> list[GMARCallback]:
    return [
        watcher(folder, every_n_train_steps=2),
        watcher(folder, every_n_train_steps=None, every_n_epochs=1, norm="l2", save_dir=folder / "second"),
    ]


ROWS = {
    "plain fp32": Row(),
    "gradient accumulation": Row(trainer=accumulated(), probes=3),
    "bf16-mixed": Row(module=Regularised, trainer={"precision": "bf16-mixed"}),
    "dropout and stochastic depth": Row(module=Regularised),
    "BatchNorm in the head": Row(module=BatchNormHead, trainer=accumulated(), probes=3),
    "a block frozen in eval": Row(module=FrozenBlock),
    "torch.compile": Row(module=Compiled, trainer={"max_epochs": 1}, probes=3),
    "torch.compile per block": Row(
        module=lambda: Compiled("eager", per_block=True), trainer={"max_epochs": 1}, probes=3
    ),
    "gradient checkpointing": Row(module=Checkpointed),
    "manual optimization, two optimizers": Row(module=TwoOptimizers),
    "validation in mid-accumulation": Row(trainer=accumulated(val_check_interval=4), probes=3),
    "EMA weights": Row(callbacks=lambda: [EMAWeightAveraging(decay=0.9)], module=Regularised),
    "EMA weights, before the callback": Row(
        callbacks=lambda: [EMAWeightAveraging(decay=0.9)], module=Regularised, last=True
    ),
    "StochasticWeightAveraging": Row(
        module=BatchNormHead,
        callbacks=lambda: [StochasticWeightAveraging(1e-3, swa_epoch_start=1, annealing_epochs=1)],
        trainer={"max_epochs": 3},
    ),
    "two persistent workers": Row(data=lambda: loaders(num_workers=2, persistent_workers=True)),
    "validation from a stream": Row(data=streamed),
    "stopped by a time limit": Row(callbacks=lambda: [SevenSteps()], trainer={"max_epochs": -1}, probes=3),
    "stopped by max_steps": Row(trainer={"max_epochs": -1, "max_steps": 7}, probes=3),
    "stopped by another callback": Row(callbacks=lambda: [StopsEarly()], probes=3),
    "a callback that draws random numbers": Row(callbacks=lambda: [DrawsNumbers()]),
    "a callback that draws, before ours": Row(callbacks=lambda: [DrawsNumbers()], last=True),
    "two GMARCallbacks": Row(watch=two_watchers),
    "every second probe fails": Row(
        module=FailingProbes, watch=lambda folder: [watcher(folder, on_error="warn")], probes=3, failed=3
    ),
    # What users do beyond that
    "a forward that logs, counts and draws": Row(module=LogsInForward),
    "early stopping on the importance": Row(
        callbacks=lambda: [EarlyStopping("val/loss", patience=9), ModelCheckpoint(monitor="val/loss")],
        trainer={"enable_checkpointing": True},
    ),
    "a data set with its own randomness": Row(data=shared_data, probes=3),
    "augmentation in transfer hooks": Row(
        module=Dictionaries,
        data=lambda: tuple(
            DataLoader(Images(32, seed), 4, shuffle=seed == 0, collate_fn=as_dictionaries) for seed in (0, 1)
        ),
    ),
    "two validation sets": Row(
        module=TwoValidationSets,
        data=lambda: (loaders()[0], [loaders()[1], DataLoader(Images(8, seed=3), 4)]),
    ),
    "a combined loader": Row(
        module=Combined,
        data=lambda: (loaders()[0], CombinedLoader({"a": loaders()[1], "b": loaders()[1]}, "min_size")),
    ),
    "loaders remade every epoch": Row(data=Module, trainer={"reload_dataloaders_every_n_epochs": 1}),
    "no validation at all": Row(
        data=lambda: (loaders()[0],),
        watch=lambda folder: [watcher(folder, probe_batch=(images_of(4), torch.arange(4)))],
    ),
    "bf16-true": Row(trainer={"precision": "bf16-true"}),
    "64-true": Row(trainer={"precision": "64-true"}),
}


@pytest.mark.parametrize("name", ROWS)
def test_training_is_the_same_with_and_without(name: str, tmp_path: Path) -> None:
    row = ROWS[name]
    watchers = row.watch(tmp_path)

    def watched() -> list[Any]:
        own = row.callbacks()
        return [*own, *watchers] if row.last else [*watchers, *own]

    settings = {"max_epochs": 2, **row.trainer}
    with_it, _, rows = run_and_digest(tmp_path / "a", row.module, row.data, watched, **settings)
    without, _, _ = run_and_digest(tmp_path / "b", row.module, row.data, row.callbacks, **settings)
    assert with_it == without
    record = History.load(tmp_path / "gmar").records
    failed = [line for line in record if line.failure]
    assert len(record) - len(failed) >= row.probes, record
    assert len(failed) == row.failed
    assert rows.of_gmar()
