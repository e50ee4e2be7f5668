"""W&B: tables that grow, sortable summaries and versioned artefacts, read from the files that are synced."""

import json
import os
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger

from gmar_lightning import History
from tests.helpers.tiny import Classifier, fit, loaders, watcher
from tests.helpers.wandb_reader import read_run

wandb = pytest.importorskip("wandb")


class Dying(Classifier):
    """Head 1 of the second block loses its way out at half time."""

    def training_step(self, batch, batch_idx):
        if self.global_step >= 24:
            with torch.no_grad():
                self.net.blocks[1].attn.proj.weight[:, 8:] = 0
        return super().training_step(batch, batch_idx)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with a planted collapse: what is synced, its folder, its record, and the adapter's tables."""
    folder = tmp_path_factory.mktemp("tables")
    before = dict(os.environ)
    os.environ.update(WANDB_MODE="offline", WANDB_SILENT="true", WANDB_DATA_DIR=str(folder / "data"))
    try:
        logger = WandbLogger(project="test", save_dir=folder)
        callback = watcher(folder, every_n_train_steps=2)
        fit(folder, Dying(), loaders(), callbacks=[callback], logger=logger, max_epochs=7)
        tables = callback.watches[0].recording.publisher._adapters[0]._tables
        sync_dir = Path(logger.experiment.settings.sync_dir)
        wandb.finish()
        wandb.teardown()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return read_run(sync_dir), sync_dir, History.load(folder / "gmar"), tables


def increments(run, folder, key):
    """Rows of each increment, with the step it was logged at."""
    for row in run.rows(key):
        logged = row[key]
        assert logged["_type"] == "incremental-table-file"
        content = json.loads((folder / "files" / logged["path"]).read_text())
        yield row["trainer/global_step"], logged, content["columns"], content["data"]


def test_a_row_per_event_as_they_happen(run):
    synced, folder, history, _ = run
    rows = []
    for number, (step, logged, columns, data) in enumerate(increments(synced, folder, "gmar/events")):
        assert logged["increment_num"] == number
        rows += [dict(zip(columns, row, strict=True)) for row in data]
        assert all(row["step"] == step for row in rows[-len(data) :])
    assert history.events
    assert [(row["step"], row["kind"], row["layer"], row["head"], row["message"]) for row in rows] == [
        (event["step"], event["kind"], event["layer"], event["head"], event["message"])
        for event in history.events
    ]


def test_a_row_per_drawn_image_and_probe(run):
    synced, folder, history, _ = run
    steps = []
    for step, _, columns, data in increments(synced, folder, "gmar/images"):
        steps.append(step)
        record = next(record for record in history.records if record.step == step)
        rows = [dict(zip(columns, row, strict=True)) for row in data]
        assert len(rows) == 2  # num_heatmaps: an increment holds its own rows only
        for index, row in enumerate(rows):
            assert row["image"] == index
            assert row["prediction"] == str(record.predictions[index])
            assert row["label"] == str(history.run["labels"][index])
            assert row["probability"] == pytest.approx(record.probabilities[index], rel=1e-3)
            assert row["score"] == pytest.approx(record.scores[index], rel=1e-3)
            drift = (record.drift or {}).get("rank_correlation_previous")
            if drift is not None:
                assert row["drift"] == pytest.approx(1 - float(drift[index]), abs=2e-3)
            assert row["picture"] is not None
            assert row["map"] is not None
    assert steps == history.steps.tolist()


def test_pictures_of_rows_already_logged_are_let_go(run):
    *_, tables = run
    assert tables["gmar/images"].data
    assert all(cell is None for row in tables["gmar/images"].data for cell in row)


def test_summary_makes_runs_sortable(run):
    synced, _, history, _ = run
    assert synced.summary["gmar/collapsed_ever"] == 1
    assert synced.summary["gmar/worst_head"].endswith("blocks.1.attn head 1")
    shares = history.shares()[-1]
    assert synced.summary["gmar/worst_head_share"] == pytest.approx(2 * float(shares.min()), abs=1e-4)
    drift = history.records[-1].drift["rank_correlation_first"].mean()
    assert synced.summary["gmar/drift_from_pretrained"] == pytest.approx(1 - drift, abs=2e-3)
    last = [record.faithfulness["insertion_minus_deletion"] for record in history.records][-1]
    assert synced.summary["gmar/faithfulness"] == pytest.approx(last, rel=1e-3)
    assert "gmar/class_sensitivity" in synced.summary


def test_report_and_record_are_artefacts_under_one_name_per_run(run):
    synced, folder, history, _ = run
    identity = folder.name.rsplit("-", 1)[1]
    artefacts = {artefact.type: artefact for artefact in synced.artifacts}
    assert artefacts["gmar-report"].name == f"gmar-report-{identity}"
    assert artefacts["gmar-record"].name == f"gmar-record-{identity}"
    files = {entry.path for entry in artefacts["gmar-record"].manifest.contents}
    assert files >= {"run.json", "history.jsonl", "report.html"}
    assert {f"maps/{record.stored_maps}.npz" for record in history.records} <= files


def test_a_resumed_run_adds_rows_and_a_version(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))

    def train(epochs, ckpt_path=None):
        logger = WandbLogger(project="test", save_dir=tmp_path, id="abcd1234", resume="allow")
        callbacks = [watcher(tmp_path), ModelCheckpoint(tmp_path, save_last=True)]
        fit(
            tmp_path, Classifier(), loaders(), callbacks=callbacks, logger=logger, max_epochs=epochs,
            enable_checkpointing=True, ckpt_path=ckpt_path,
        )  # fmt: skip
        folder = Path(logger.experiment.settings.sync_dir)
        wandb.finish()
        wandb.teardown()
        return read_run(folder)

    first, second = train(1), train(2, str(tmp_path / "last.ckpt"))
    steps = History.load(tmp_path / "gmar").steps.tolist()
    logged = [[row["trainer/global_step"] for row in part.rows("gmar/images")] for part in (first, second)]
    assert sorted({*logged[0], *logged[1]}) == steps
    names = [
        {artefact.name for artefact in part.artifacts if "gmar" in artefact.type} for part in (first, second)
    ]
    assert names[0] == names[1] == {"gmar-report-abcd1234", "gmar-record-abcd1234"}
