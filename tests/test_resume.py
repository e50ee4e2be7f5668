"""Killed, interrupted and resumed runs: the record has no gap, no duplicate and no half line."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from gmar_lightning import History
from tests.one_run import EVERY, SAVED_EVERY, STEPS
from tests.tiny import Classifier, Images, fit, loaders, watcher

EXPECTED = [*range(0, STEPS + 1, EVERY)]


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.one_run", str(folder), *arguments],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(folder: Path, *arguments: str) -> str:
    process = start(folder, *arguments)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def check(folder: Path) -> History:
    """Every line is whole, every probe there once, in order, with its maps and pictures."""
    text = (folder / "gmar" / "history.jsonl").read_text()
    assert text.endswith("\n")
    assert [json.loads(line)["global_step"] for line in text.splitlines()] == EXPECTED
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        history = History.load(folder / "gmar")
    assert all(record["importance"] and not record["error"] for record in history.records)
    for record in history.records:
        stem = record["maps"]
        assert np.load(folder / "gmar" / "maps" / f"{stem}.npz")["heatmaps"].shape[0] == 8
        assert len(list((folder / "gmar" / "heatmaps" / stem).glob("*.jpg"))) == 2
    assert len(list((folder / "gmar" / "maps").glob("*.npz"))) == len(EXPECTED)
    assert [segment["segment"] for segment in history.run["segments"]] == [0]
    return history


def kill_after(folder: Path, seconds: float) -> bool:
    """Kill a run so many seconds after its training began; whether it was still running."""
    process = start(folder, "--resume")
    assert process.stdout is not None
    assert process.stdout.readline() == "begin\n"
    time.sleep(seconds)
    running = process.poll() is None
    process.kill()
    process.communicate()
    return running


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> History:
    folder = tmp_path_factory.mktemp("whole")
    finish(folder)
    return check(folder)


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), SAVED_EVERY, 11])
def test_killed_at_a_step_and_resumed(step: int, tmp_path: Path, uninterrupted: History) -> None:
    process = start(tmp_path, "--kill", str(step))
    process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL
    finish(tmp_path, "--resume")
    history = check(tmp_path)
    # Up to the last checkpoint the two runs are one.
    for ours, whole in zip(history.records, uninterrupted.records, strict=True):
        if ours["global_step"] <= SAVED_EVERY * ((step - 1) // SAVED_EVERY):
            assert ours["importance"] == whole["importance"]


@pytest.mark.slow
def test_killed_at_twenty_random_moments(tmp_path: Path) -> None:
    draw, kills, runs = random.Random(11), 0, 0
    while kills < 20:
        folder = tmp_path / f"run_{runs}"
        folder.mkdir()
        runs += 1
        # Several kills of one run: each resumes where the last one was stopped.
        for _ in range(5):
            kills += kill_after(folder, draw.uniform(0.05, 1.5))
        finish(folder, "--resume")
        check(folder)


def test_ctrl_c_closes_the_record_and_writes_the_report(tmp_path: Path) -> None:
    process = start(tmp_path, "--interrupt", "9")
    output, _ = process.communicate(timeout=300)
    assert "probes     5" in output
    assert "Traceback" not in output
    record = History.load(tmp_path / "gmar").records
    assert [line["global_step"] for line in record] == [0, 2, 4, 6, 8]
    assert "</html>" in (tmp_path / "gmar" / "report.html").read_text()
    finish(tmp_path, "--resume")
    check(tmp_path)


def test_changed_validation_images_start_a_segment(tmp_path: Path) -> None:
    trainer, _ = fit(tmp_path, Classifier(), loaders(16), callbacks=[watcher(tmp_path)], max_epochs=1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    others = loaders(16)[0], DataLoader(Images(8, seed=2), 4)
    with pytest.warns(UserWarning, match="the record starts a new segment"):
        fit(
            tmp_path, Classifier(), others, callbacks=[watcher(tmp_path)], max_epochs=2,
            ckpt_path=str(tmp_path / "a.ckpt"),
        )  # fmt: skip
    history = History.load(tmp_path / "gmar")
    by_segment = [(record["global_step"], record["segment"]) for record in history.records]
    assert by_segment == [(0, 0), (3, 0), (4, 0), (6, 1), (8, 1)]
    first, second = history.run["segments"]
    assert first["fingerprint"] != second["fingerprint"]
    assert second["from_step"] == 4


def resume(folder: Path, **changes: Any) -> tuple[Any, Any]:
    """Train four steps, save, and go on in a new trainer with a new callback."""
    first = watcher(folder, **changes)
    trainer, _ = fit(folder, Classifier(), loaders(16), callbacks=[first], max_epochs=1)
    trainer.save_checkpoint(folder / "a.ckpt")
    second = watcher(folder, **changes)
    fit(folder, Classifier(), loaders(16), callbacks=[second], max_epochs=2, ckpt_path=str(folder / "a.ckpt"))
    return first, second


def test_detector_goes_on_where_it_was(tmp_path: Path) -> None:
    whole = watcher(tmp_path / "whole", every_n_train_steps=1)
    torch.manual_seed(0)
    fit(tmp_path, Classifier(), loaders(16), callbacks=[whole], max_epochs=2)
    first, second = resume(tmp_path, every_n_train_steps=1)
    assert second.detector is not first.detector
    shapes = [[len(row) for row in callback.detector.states] for callback in (whole, second)]
    assert shapes == [[2, 2], [2, 2]]
    statuses = [{state.status for row in c.detector.states for state in row} for c in (first, second)]
    assert statuses == [{"warming"}, {"alive"}]  # 5 probes before the checkpoint, 4 after it
    steps = [record["global_step"] for record in History.load(tmp_path / "gmar").records]
    assert steps == [0, 1, 2, 3, 4, 5, 6, 7, 8]


def test_state_is_plain_and_loads_with_weights_only(tmp_path: Path) -> None:
    resume(tmp_path)
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    (state,) = [value for key, value in saved["callbacks"].items() if key.startswith("GMARCallback")]
    json.dumps(state)


def test_resuming_without_a_state_starts_a_record(tmp_path: Path) -> None:
    trainer, _ = fit(tmp_path, Classifier(), loaders(16), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    fit(
        tmp_path, Classifier(), loaders(16), callbacks=[watcher(tmp_path)], max_epochs=2,
        ckpt_path=str(tmp_path / "a.ckpt"),
    )  # fmt: skip
    assert [record["global_step"] for record in History.load(tmp_path / "gmar").records] == [4, 6, 8]


def test_record_folder_that_is_gone_is_started_again(tmp_path: Path) -> None:
    import shutil

    trainer, _ = fit(tmp_path, Classifier(), loaders(16), callbacks=[watcher(tmp_path)], max_epochs=1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    shutil.rmtree(tmp_path / "gmar")
    fit(
        tmp_path, Classifier(), loaders(16), callbacks=[watcher(tmp_path)], max_epochs=2,
        ckpt_path=str(tmp_path / "a.ckpt"),
    )  # fmt: skip
    assert [record["global_step"] for record in History.load(tmp_path / "gmar").records] == [6, 8]
