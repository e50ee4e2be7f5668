"""Where the time of a probe goes: `python -m tests.benchmarks.breakdown [--model NAME] [--probes 3]`.

A real run with CSV, TensorBoard and offline W&B loggers; CPU time of each part without the parts inside it, mean over
the probes after the first, beside the first one. Maps are not tested (`faithfulness_every=None`): that is a
measurement of its own, at the first and the last probe of a run.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from torch.utils.data import DataLoader, TensorDataset

from gmar_lightning.callback import GMARCallback
from gmar_lightning.monitor import probing
from gmar_lightning.monitor.history import History
from gmar_lightning.monitor.selftest import SelfTest
from gmar_lightning.show import publication, publisher
from gmar_lightning.show.loggers import TensorBoardAdapter
from gmar_lightning.show.wandb_logger import WandbAdapter
from gmar_lightning.training.model import Classifier

PLACES: list[tuple[str, Any, str]] = [
    ("isolation", SelfTest, "take"),
    ("explanation", probing, "explain_together"),
    ("detection", probing.Prober, "_judged"),
    ("detection", probing.Prober, "_drift_of"),
    ("drawing", publisher, "pictures"),
    ("drawing", publisher, "flagged_heads"),
    ("encoding and writing pictures", History, "save_overlays"),
    ("writing the record", History, "append"),
    ("logging: W&B", WandbAdapter, "publish"),
    ("logging: TensorBoard", TensorBoardAdapter, "publish"),
    ("logging: CSV", publication.Adapter, "publish"),
]


class Stopwatch:
    """CPU seconds of named parts, each without the parts that run inside it."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)
        self._inside: list[float] = []

    def timed(self, name: str, action: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(action)
        def run(*args: Any, **kwargs: Any) -> Any:
            self._inside.append(0.0)
            began = time.process_time()
            try:
                return action(*args, **kwargs)
            finally:
                took = time.process_time() - began
                self.spent[name] += took - self._inside.pop()
                if self._inside:
                    self._inside[-1] += took

        return run


class Timed(GMARCallback):
    """Keeps what each probe spent where."""

    watch: Stopwatch
    probes: list[dict[str, float]]

    def _run_probe(self, *args: Any, **kwargs: Any) -> None:
        self.watch.spent.clear()
        self.watch.timed("everything else", super()._run_probe)(*args, **kwargs)
        if "explanation" in self.watch.spent:
            self.probes.append(dict(self.watch.spent))


def probes_of(model: str, size: int, count: int, folder: Path) -> list[dict[str, float]]:
    """Seconds by part of so many probes of 32 images."""
    torch.manual_seed(0)
    train = TensorDataset(torch.randn(count, 3, size, size), torch.randint(10, (count,)))
    val = TensorDataset(torch.randn(32, 3, size, size), torch.arange(32) % 10)
    callback = Timed(every_n_train_steps=1, faithfulness_every=None)
    callback.watch, callback.probes = Stopwatch(), []
    kept = [(place, name, getattr(place, name)) for _, place, name in PLACES]
    for part, place, name in PLACES:
        setattr(place, name, callback.watch.timed(part, getattr(place, name)))
    try:
        trainer = Trainer(
            accelerator="cpu", callbacks=[callback], max_steps=count, log_every_n_steps=1,
            logger=[CSVLogger(folder), TensorBoardLogger(folder), WandbLogger(save_dir=folder, offline=True)],
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
            limit_val_batches=0,
        )  # fmt: skip
        trainer.fit(Classifier(model, image_size=size), DataLoader(train, 1), DataLoader(val, 32))
    finally:
        for place, name, original in kept:
            setattr(place, name, original)
    return callback.probes


def table(probes: list[dict[str, float]]) -> str:
    """Rows of Markdown: part, seconds of a later probe, part of its explanation, seconds of the first probe."""
    first, later = probes[0], probes[1:]
    names = [*dict.fromkeys(name for name, _, _ in PLACES), "everything else"]
    mean = {name: sum(probe.get(name, 0.0) for probe in later) / len(later) for name in names}
    whole = mean["explanation"]
    rows = [
        f"| {name} | {mean[name]:.3f} | {mean[name] / whole:.1%} | {first.get(name, 0.0):.3f} |"
        for name in names
    ]
    outside = sum(mean.values()) - whole
    rows.append(f"| **all but the explanation** | {outside:.3f} | **{outside / whole:.1%}** | |")
    total = sum(mean.values())
    rows.append(
        f"| whole probe | {total:.3f} | | {sum(first.values()):.3f}, {sum(first.values()) / total:.2f} x |"
    )
    return "\n".join(
        ["| part | CPU seconds | of the explanation | first probe |", "|---|---|---|---|", *rows]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--probes", type=int, default=3)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        probes = probes_of(asked.model, asked.size, asked.probes, Path(folder))
    print(f"\n{asked.model}, {asked.size} px, 32 images, 8 drawn\n\n{table(probes)}")


if __name__ == "__main__":
    main()
