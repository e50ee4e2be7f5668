"""Killed, interrupted and resumed runs: the record has no gap, no duplicate and no half line."""

from __future__ import annotations

import json
import multiprocessing
import random
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from gmar_lightning import History
from tests.helpers import one_run
from tests.helpers.one_run import EVERY, SAVED_EVERY, STEPS
from tests.helpers.tiny import Classifier, Images, fit, loaders, watcher

EXPECTED = [*range(0, STEPS + 1, EVERY)]


# One process imports everything once and forks the runs: they begin at once, and share nothing.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.helpers.one_run"])


def start(folder: Path, interrupt: tuple[int | str, int] | None = None) -> Any:
    process = CONTEXT.Process(target=one_run.run, args=(folder, folder / "output.txt", interrupt))
    process.start()
    return process


def finish(folder: Path, interrupt: tuple[int | str, int] | None = None) -> int:
    process = start(folder, interrupt)
    process.join(timeout=300)
    return process.exitcode


def check(folder: Path) -> History:
    """Every line is whole, every probe there once, in order, with its maps and pictures."""
    text = (folder / "gmar" / "history.jsonl").read_text()
    assert text.endswith("\n")
    assert [json.loads(line)["global_step"] for line in text.splitlines()] == EXPECTED
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        history = History.load(folder / "gmar")
    assert all(record.importance is not None and not record.failure for record in history.records)
    for record in history.records:
        stem = record.stored_maps
        assert np.load(folder / "gmar" / "maps" / f"{stem}.npz")["levels"].shape[1] == 8
        assert len(list((folder / "gmar" / "heatmaps" / stem).glob("*.jpg"))) == 2
    assert len(list((folder / "gmar" / "maps").glob("*.npz"))) == len(EXPECTED)
    assert [segment["segment"] for segment in history.run["segments"]] == [0]
    return history


def kill_after(folder: Path, seconds: float) -> bool:
    """Kill a run so many seconds after it began; whether it was still running."""
    before = len(said(folder))
    process = start(folder)
    deadline = time.monotonic() + 120
    while "begin" not in said(folder)[before:] and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(seconds)
    running = process.is_alive()
    process.kill()
    process.join()
    return running


def said(folder: Path) -> str:
    output = folder / "output.txt"
    return output.read_text() if output.exists() else ""


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> History:
    folder = tmp_path_factory.mktemp("whole")
    assert finish(folder) == 0, said(folder)
    return check(folder)


@pytest.mark.parametrize("step", [1, SAVED_EVERY, 11, 26])
def test_killed_at_a_step_and_resumed(step: int, tmp_path: Path, uninterrupted: History) -> None:
    assert finish(tmp_path, (step, signal.SIGKILL)) == -signal.SIGKILL
    assert finish(tmp_path) == 0, said(tmp_path)
    history = check(tmp_path)
    # Up to the last checkpoint the two runs are one.
    for ours, whole in zip(history.records, uninterrupted.records, strict=True):
        if ours.global_step <= SAVED_EVERY * ((step - 1) // SAVED_EVERY):
            np.testing.assert_array_equal(ours.importance, whole.importance)


@pytest.mark.slow
def test_killed_at_twenty_random_moments(tmp_path: Path) -> None:
    draw, kills, runs = random.Random(11), 0, 0
    while kills < 20:
        folder = tmp_path / f"run_{runs}"
        folder.mkdir()
        runs += 1
        # Several kills of one run: each resumes where the last one was stopped.
        for _ in range(5):
            kills += kill_after(folder, draw.uniform(0.0, 2.0))
        assert finish(folder) == 0, said(folder)
        check(folder)


def test_ctrl_c_closes_the_record_and_writes_the_report(tmp_path: Path) -> None:
    finish(tmp_path, (9, signal.SIGINT))
    assert "probes     5" in said(tmp_path)
    assert "Traceback" not in said(tmp_path)
    record = History.load(tmp_path / "gmar").records
    assert [line.global_step for line in record] == [0, 2, 4, 6, 8]
    assert "</html>" in (tmp_path / "gmar" / "report.html").read_text()
    assert finish(tmp_path) == 0
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
    by_segment = [(record.global_step, record.segment) for record in history.records]
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
    assert statuses == [{"warming"}, {"alive"}]  # 4 probes before the checkpoint, 4 after it
    steps = [record.global_step for record in History.load(tmp_path / "gmar").records]
    assert steps == [0, 2, 3, 4, 5, 6, 7, 8]  # 0 and 1 share the logger's x


def test_no_probe_is_lost_when_every_step_is_probed_and_the_checkpoint_is_made_in_mid_epoch(
    tmp_path: Path,
) -> None:
    keep = ModelCheckpoint(tmp_path, filename="a", every_n_train_steps=3, save_top_k=-1)
    settings: dict[str, Any] = {"max_epochs": 1, "enable_checkpointing": True}
    first = watcher(tmp_path, every_n_train_steps=1)
    fit(tmp_path, Classifier(), loaders(16), callbacks=[first, keep], **settings)
    second = watcher(tmp_path, every_n_train_steps=1)
    fit(
        tmp_path,
        Classifier(),
        loaders(16),
        callbacks=[second],
        ckpt_path=str(tmp_path / "a.ckpt"),
        **settings,
    )
    steps = [record.global_step for record in History.load(tmp_path / "gmar").records]
    assert steps == [0, 2, 3, 4]


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
    assert [record.global_step for record in History.load(tmp_path / "gmar").records] == [4, 6, 8]


def test_record_folder_that_is_gone_is_started_again(tmp_path: Path) -> None:
    import shutil

    trainer, _ = fit(tmp_path, Classifier(), loaders(16), callbacks=[watcher(tmp_path)], max_epochs=1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    shutil.rmtree(tmp_path / "gmar")
    fit(
        tmp_path, Classifier(), loaders(16), callbacks=[watcher(tmp_path)], max_epochs=2,
        ckpt_path=str(tmp_path / "a.ckpt"),
    )  # fmt: skip
    assert [record.global_step for record in History.load(tmp_path / "gmar").records] == [6, 8]
