"""What watching costs a training run: `python -m tests.benchmarks.overhead [--only digits|vit_small|steps]`.

Arms take turns in one process, in one training: stretches of steps without anything, with one probe of `GMARCallback`
(its default: one per 100 steps), with `wandb.watch(log="gradients")` (its default in Lightning: one histogram per 100
steps), with a plain image logger (one forward of the same 32 images, 8 of them logged), all with an offline W&B run.

- `configs/digits.yaml`'s own model: stretches of 100 steps; the median difference to the stretch without, and the
  time inside the probe itself;
- ViT-S/16 at 224 px: on a CPU 100 steps of 64 images take an hour, so a stretch is one step of `--batch` images, and
  what an arm adds to it is divided by 100 such steps, scaled to 64 images;
- steps that are read (`read="step"`) beside steps that are not, in turns: their ratio.

CPU time, as other work on the machine leaves it alone.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gmar_lightning.callback import GMARCallback
from gmar_lightning.explain.training_step import StepReader
from gmar_lightning.training.data import Digits
from gmar_lightning.training.model import Classifier

INTERVAL = 100
ARMS = ("nothing", "GMARCallback", "wandb.watch", "image logger")


class OnCall(GMARCallback):
    """Probes when it is told to."""

    def on_train_batch_end(self, *args: Any) -> None:
        return None

    def probe(self, trainer: Trainer, pl_module: Any) -> None:
        self._run_probe(trainer, pl_module, trainer.global_step)


class Turns(Callback):
    """Gives each arm a stretch of `length` steps in turn, and times it; the first round warms up."""

    def __init__(self, length: int, probe: OnCall, images: torch.Tensor) -> None:
        self.length, self.probe, self.images = length, probe, images
        self.spent: dict[str, list[float]] = defaultdict(list)
        self.inside: list[float] = []
        self.count = 0

    def arm(self) -> str:
        turn, place = divmod(self.count // self.length, len(ARMS))
        return ARMS[(place + turn) % len(ARMS)]  # whoever comes first changes from round to round

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if self.count % self.length == 0:
            self.began = time.process_time()
            if self.arm() == "wandb.watch":
                trainer.loggers[0].experiment.watch(pl_module, log="gradients", log_freq=self.length)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        arm, at = self.arm(), self.count % self.length
        if at == self.length // 2:
            began = time.process_time()
            if arm == "GMARCallback":
                self.probe.probe(trainer, pl_module)
                self.inside.append(time.process_time() - began)
            elif arm == "image logger":
                self.log_images(trainer, pl_module)
        if at == self.length - 1:
            if arm == "wandb.watch":
                trainer.loggers[0].experiment.unwatch(pl_module)
            self.spent[arm].append(time.process_time() - self.began)
        self.count += 1

    def log_images(self, trainer: Any, pl_module: Any) -> None:
        pl_module.eval()
        with torch.no_grad():
            logits = pl_module(self.images)
        pl_module.train()
        shown = [(image.permute(1, 2, 0) * 64 + 128).byte().numpy() for image in self.images[:8]]
        captions = [f"class {int(row.argmax())}" for row in logits[:8]]
        trainer.loggers[0].log_image("samples", shown, step=trainer.global_step, caption=captions)


def overheads(
    module: Any, data: Any, images: torch.Tensor, length: int, rounds: int, per: float, folder: Path
) -> list[str]:
    """Rows of Markdown; `per` turns what an arm adds to a stretch into a share of 100 steps of 64 images."""
    probe = OnCall(probe_batch=(images, torch.arange(len(images)) % 10), every_n_train_steps=10**9)
    turns = Turns(length, probe, images)
    steps = (rounds + 1) * len(ARMS) * length
    trainer = Trainer(
        accelerator="cpu", callbacks=[probe, turns], max_steps=steps, limit_val_batches=0, log_every_n_steps=length,
        logger=[WandbLogger(save_dir=folder, offline=True), CSVLogger(folder)], num_sanity_val_steps=0,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(module, **data)
    plain = statistics.median(turns.spent["nothing"][1:])
    share = per / plain
    rows = [f"| GMARCallback, time inside its probes | {statistics.median(turns.inside[1:]) * share:.2%} | |"]
    for arm in ARMS[1:]:
        pairs = zip(turns.spent[arm][1:], turns.spent["nothing"][1:], strict=False)
        added = [(with_it - without) * share for with_it, without in pairs]
        rows.append(
            f"| {arm}, paired | {statistics.median(added):.2%} | {min(added):.2%} to {max(added):.2%} |"
        )
    name = type(module.net).__name__ if hasattr(module, "net") else "model"
    return [f"{name}: a stretch without anything {plain:.2f} s CPU, {rounds} rounds", *rows]


def digits(folder: Path, rounds: int) -> list[str]:
    seed_everything(7, verbose=False)
    data = Digits(mean=[0.5] * 3, std=[0.5] * 3)
    data.prepare_data()
    data.setup("fit")
    images = torch.stack([data.val_dataloader().dataset[index][0] for index in range(32)])
    return overheads(digits_model(), {"datamodule": data}, images, INTERVAL, rounds, 1.0, folder)


def digits_model() -> Classifier:
    return Classifier(
        "vit_tiny_patch16_224", image_size=32, lr=1e-3,
        model_args={"patch_size": 4, "embed_dim": 96, "depth": 6, "num_heads": 6},
    )  # fmt: skip


def vit_small(folder: Path, batch: int, rounds: int) -> list[str]:
    torch.manual_seed(0)
    count = batch * (rounds + 1) * len(ARMS)
    train = TensorDataset(torch.randn(count, 3, 224, 224), torch.randint(10, (count,)))
    data = {"train_dataloaders": DataLoader(train, batch)}
    model = Classifier("vit_small_patch16_224", image_size=224)
    return overheads(model, data, torch.randn(32, 3, 224, 224), 1, rounds, batch / (64 * INTERVAL), folder)


def read_steps(model: nn.Module, images: torch.Tensor, rounds: int) -> list[str]:
    """A training step that is read beside one that is not, in turns."""
    optimizer, reader = torch.optim.AdamW(model.parameters(), 1e-4), StepReader(model)
    labels, spent = torch.arange(len(images)) % 10, defaultdict(list)

    def step() -> None:
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    for turn in range(2 * (rounds + 1)):
        began = time.process_time()
        if turn % 2:
            with reader.watching():
                step()
            reader.signals()
        else:
            step()
        spent[turn % 2].append(time.process_time() - began)
    ratios = [read / plain for plain, read in zip(spent[0][1:], spent[1][1:], strict=True)]
    plain = statistics.median(spent[0][1:])
    return [
        f"| step read, {tuple(images.shape)}, plain step {plain:.3f} s | {statistics.median(ratios):.3f} x | "
        f"{min(ratios):.3f} to {max(ratios):.3f} |"
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("digits", "vit_small", "steps"))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as place:
        folder, lines = Path(place), []
        if asked.only in (None, "steps"):
            lines += read_steps(digits_model().train(), torch.randn(64, 3, 32, 32), 5 * asked.rounds)
            model = Classifier("vit_small_patch16_224", image_size=224).train()
            lines += read_steps(model, torch.randn(8, 3, 224, 224), asked.rounds)
        if asked.only in (None, "digits"):
            lines += digits(folder, asked.rounds)
        if asked.only in (None, "vit_small"):
            lines += vit_small(folder, asked.batch, asked.rounds)
    print("\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
