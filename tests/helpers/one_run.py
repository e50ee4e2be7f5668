"""A run for tests/test_resume.py to kill, in a process of its own."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from tests.helpers.tiny import Classifier, Images, fit, watcher

STEPS, EVERY, SAVED_EVERY = 40, 2, 5


class Interrupts(Callback):
    """Presses Ctrl-C, or pulls the plug, before the step after so many."""

    def __init__(self, step: int | str, number: int):
        self.step, self.number = step, number

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), self.number)


def when_the_report_is_written(number: int) -> None:
    """Send this process a signal at the moment its report is opened for writing."""

    def heard(event: str, details: tuple[Any, ...]) -> None:
        if event == "open" and str(details[0]).endswith(".report.html.partial"):
            os.kill(os.getpid(), number)

    sys.addaudithook(heard)


def run(folder: Path, output: Path, interrupt: tuple[int | str, int] | None = None) -> None:
    """Train, from the last checkpoint where there is one; `interrupt` is (step or "report", signal)."""
    with output.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    seed_everything(5, verbose=False)
    last = folder / "last.ckpt"
    keep = ModelCheckpoint(folder, filename="kept", save_last=True, every_n_train_steps=SAVED_EVERY)
    callbacks: list[Any] = [watcher(folder, every_n_train_steps=EVERY), keep]
    if interrupt is not None and interrupt[0] == "report":
        when_the_report_is_written(interrupt[1])
    elif interrupt is not None:
        callbacks.append(Interrupts(*interrupt))
    data = DataLoader(Images(32), 4, shuffle=True), DataLoader(Images(8, seed=1), 4)
    print("begin", flush=True)
    fit(
        folder, Classifier(), data, callbacks=callbacks, max_epochs=STEPS // 8, enable_checkpointing=True,
        ckpt_path=str(last) if last.exists() else None,
    )  # fmt: skip
    print("end", flush=True)
