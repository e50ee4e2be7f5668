"""A run for tests/test_resume.py to kill: `python -m tests.one_run FOLDER [--resume] [--interrupt N] [--kill N]`."""

from __future__ import annotations

import argparse
import os
import signal
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from tests.tiny import Classifier, Images, fit, watcher

STEPS, EVERY, SAVED_EVERY = 40, 2, 5


class Interrupts(Callback):
    """Presses Ctrl-C, or pulls the plug, after so many steps."""

    def __init__(self, step: int, number: int):
        self.step, self.number = step, number

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), self.number)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--interrupt", type=int)
    parser.add_argument("--kill", type=int)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    seed_everything(5, verbose=False)
    last = asked.folder / "last.ckpt"
    keep = ModelCheckpoint(asked.folder, filename="kept", save_last=True, every_n_train_steps=SAVED_EVERY)
    callbacks: list[Any] = [watcher(asked.folder, every_n_train_steps=EVERY), keep]
    if asked.interrupt is not None:
        callbacks.append(Interrupts(asked.interrupt, signal.SIGINT))
    if asked.kill is not None:
        callbacks.append(Interrupts(asked.kill, signal.SIGKILL))
    data = DataLoader(Images(32), 4, shuffle=True), DataLoader(Images(8, seed=1), 4)
    print("begin", flush=True)
    fit(
        asked.folder, Classifier(), data, callbacks=callbacks, max_epochs=STEPS // 8, enable_checkpointing=True,
        ckpt_path=str(last) if asked.resume and last.exists() else None,
    )  # fmt: skip
    print("end", flush=True)


if __name__ == "__main__":
    main()
