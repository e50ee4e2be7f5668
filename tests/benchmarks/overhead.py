"""What the callback costs a training run: `python -m tests.benchmarks.overhead [--quick]`.

Two trainings, each with the callback at its default interval of 100 steps:

- `configs/digits.yaml`'s own model and data, run with and without the callback in alternating pairs;
- ViT-S/16 at 224 px with batches of 64. On a CPU 100 such steps take an hour, so the cost of a step (median of
  several, batch of `--batch`, scaled to 64) and the cost of one whole probe (32 images explained, judged, 8
  overlays and both grids drawn, record and loggers written) are measured in one alternating series, and the
  overhead is their ratio over 100 steps.

Both wall time and CPU time are printed: on a machine with other work to do, CPU time is the steadier one.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch.utils.data import DataLoader, TensorDataset

from gmar_lightning.callback import GMARCallback
from gmar_lightning.training.data import Digits
from gmar_lightning.training.model import Classifier

INTERVAL = 100


class Clock(Callback):
    """Wall and CPU seconds of the training, from the first step to the last hook."""

    def on_fit_start(self, *args: Any) -> None:
        self.began = time.perf_counter(), time.process_time()

    def on_fit_end(self, *args: Any) -> None:
        self.wall, self.cpu = time.perf_counter() - self.began[0], time.process_time() - self.began[1]


def fit(folder: Path, module: Any, data: Any, callbacks: list[Any], **settings: Any) -> Clock:
    clock = Clock()
    trainer = Trainer(
        accelerator="cpu", callbacks=[*callbacks, clock], enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, logger=[CSVLogger(folder), TensorBoardLogger(folder)], **settings,
    )  # fmt: skip
    trainer.fit(module, datamodule=data) if not isinstance(data, tuple) else trainer.fit(module, *data)
    return clock


def digits(folder: Path, pairs: int, epochs: int) -> tuple[float, float, str]:
    """Overhead of paired runs of the digits model: wall and CPU, as shares of the run without."""

    def once(callbacks: list[Any]) -> Clock:
        seed_everything(7, verbose=False)
        model = Classifier(
            "vit_tiny_patch16_224", image_size=32, lr=1e-3,
            model_args={"patch_size": 4, "embed_dim": 96, "depth": 6, "num_heads": 6},
        )  # fmt: skip
        data = Digits(mean=[0.5] * 3, std=[0.5] * 3)
        return fit(folder, model, data, callbacks, max_epochs=epochs)

    wall, cpu = [], []
    for pair in range(pairs):
        # Whoever goes second finds a warmer machine: take turns.
        arms = [[GMARCallback()], []] if pair % 2 else [[], [GMARCallback()]]
        first, second = (once(arm) for arm in arms)
        watched, plain = (first, second) if pair % 2 else (second, first)
        wall.append(watched.wall / plain.wall - 1)
        cpu.append(watched.cpu / plain.cpu - 1)
    steps = epochs * 23
    note = f"{pairs} pairs of {steps} steps, {2 + steps // INTERVAL} probes each"
    return statistics.median(wall), statistics.median(cpu), note


class StepTimes(Callback):
    """Seconds of each training step, validation and probes left out."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def on_train_batch_start(self, *args: Any) -> None:
        self.began = time.perf_counter(), time.process_time()

    def on_train_batch_end(self, *args: Any) -> None:
        self.wall.append(time.perf_counter() - self.began[0])
        self.cpu.append(time.process_time() - self.began[1])


class TimedCallback(GMARCallback):
    """Also notes what each probe took, everything included."""

    def _run_probe(self, *args: Any, **kwargs: Any) -> None:
        began = time.perf_counter(), time.process_time()
        super()._run_probe(*args, **kwargs)
        self.costs.append((time.perf_counter() - began[0], time.process_time() - began[1]))

    costs: list[tuple[float, float]]


def vit_small(folder: Path, batch: int, steps: int) -> tuple[float, float, str]:
    """Overhead of ViT-S/16 at 224 px: one probe against 100 steps of 64 images."""
    torch.manual_seed(0)
    train = TensorDataset(torch.randn(steps * batch, 3, 224, 224), torch.randint(10, (steps * batch,)))
    val = TensorDataset(torch.randn(32, 3, 224, 224), torch.arange(32) % 10)
    times, callback = StepTimes(), TimedCallback(every_n_train_steps=2)
    callback.costs = []
    model = Classifier("vit_small_patch16_224", image_size=224)
    data = DataLoader(train, batch), DataLoader(val, 32)
    # The clock is read before our callback's hook: a step is a step, a probe is a probe.
    fit(
        folder, model, data, [times, callback], max_epochs=1, num_sanity_val_steps=0, limit_val_batches=0,
        log_every_n_steps=1,
    )  # fmt: skip
    scale = 64 / batch
    probes = [cost for cost in callback.costs if cost[0] > 0.05]  # asked at the end, it had just taken one
    found = []
    for kind, series in enumerate((times.wall, times.cpu)):
        step = statistics.median(series[1:]) * scale
        probe = statistics.median(cost[kind] for cost in probes)
        found.append(probe / (INTERVAL * step))
    step, probe = statistics.median(times.wall[1:]) * scale, statistics.median(cost[0] for cost in probes)
    cpu_step, cpu_probe = statistics.median(times.cpu[1:]) * scale, statistics.median(c[1] for c in probes)
    note = (
        f"step of 64 images {step:.1f} s (CPU {cpu_step:.1f} s; {len(times.wall)} steps of {batch}, scaled), "
        f"probe {probe:.1f} s (CPU {cpu_probe:.1f} s; {len(probes)} probes)"
    )
    return found[0], found[1], note


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer pairs and steps")
    parser.add_argument("--only", choices=("digits", "vit_small"))
    parser.add_argument("--batch", type=int, default=16)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        if asked.only != "vit_small":
            pairs, epochs = (2, 9) if asked.quick else (5, 20)
            rows.append(("digits, 32 px, batch 64", *digits(Path(folder), pairs, epochs)))
        if asked.only != "digits":
            steps = 4 if asked.quick else 12
            rows.append(("ViT-S/16, 224 px, batch 64", *vit_small(Path(folder), asked.batch, steps)))
    print("\n| training | overhead, wall | overhead, CPU | measured |\n|---|---|---|---|")
    for name, wall, cpu, note in rows:
        print(f"| {name} | {wall:.2%} | {cpu:.2%} | {note} |")


if __name__ == "__main__":
    main()
