"""What the loggers received, read back from the files they wrote."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from gmar_lightning import GMARCallback, History
from gmar_lightning.show.render import overlay
from tests.helpers.wandb_reader import read_run

wandb = pytest.importorskip("wandb")


class Tiny(LightningModule):
    def __init__(self, kill_at=None):
        super().__init__()
        self.model = timm.models.VisionTransformer(
            img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=4, num_classes=4
        )
        self.kill_at = kill_at

    def forward(self, images):
        return self.model(images)

    def training_step(self, batch, _):
        if self.kill_at is not None and self.global_step >= self.kill_at:
            with torch.no_grad():  # head 1 of the second block loses its way out: a planted collapse
                self.model.blocks[1].attn.proj.weight[:, 6:12] = 0
        loss = torch.nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, _):
        self.log("val/accuracy", (self(batch[0]).argmax(-1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-3)


def loaders(count=64):
    seed_everything(0, verbose=False)
    images, labels = torch.randn(count, 3, 16, 16), torch.arange(count) % 4
    data = TensorDataset(images, labels)
    return DataLoader(data, 8), DataLoader(data, 8)


def fit(tmp_path, loggers, callback, steps=24, model=None):
    trainer = Trainer(
        max_steps=steps,
        max_epochs=-1,
        logger=loggers,
        callbacks=[callback],
        log_every_n_steps=1,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(model or Tiny(), *loaders())
    return trainer


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    yield
    wandb.teardown()


@pytest.fixture(scope="module")
def wandb_run(tmp_path_factory):
    """One real offline run with a planted collapse, its parsed file, its folder and its record."""
    folder = tmp_path_factory.mktemp("wandb")
    before = dict(os.environ)
    os.environ.update(WANDB_MODE="offline", WANDB_SILENT="true")
    try:
        logger = WandbLogger(project="test", save_dir=folder)
        callback = GMARCallback(
            every_n_train_steps=2,
            num_images=6,
            num_heatmaps=3,
            class_names=["Bär", "猫", "<b>dog</b>", "d"],
            save_dir=folder / "gmar",
            log_per_head=True,
            log_rollouts=["paper"],
            on_error="raise",
        )
        fit(folder, logger, callback, steps=60, model=Tiny(kill_at=30))
        sync_dir = Path(logger.experiment.settings.sync_dir)
        wandb.finish()
        wandb.teardown()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return read_run(sync_dir), sync_dir, History.load(folder / "gmar")


def test_one_row_per_probe_at_the_steps_of_the_record(wandb_run):
    run, _, history = wandb_run
    for key in ("gmar/heatmaps", "gmar/head_importance", "gmar/head_evolution", "gmar/collapsed_heads"):
        assert [row["trainer/global_step"] for row in run.rows(key)] == history.steps.tolist(), key
    rows = [row["_step"] for row in run.rows("gmar/collapsed_heads")]
    assert rows == [row["_step"] for row in run.rows("gmar/heatmaps")]  # pictures and numbers share a row


def test_probe_steps_are_training_steps(wandb_run):
    run, _, history = wandb_run
    training = {row["trainer/global_step"] for row in run.rows("train/loss")}
    assert set(history.steps.tolist()) <= training


def test_scalars_equal_the_record(wandb_run):
    run, _, history = wandb_run
    rows = run.rows("gmar/compute_seconds")
    assert len(rows) == len(history.records)
    for row, record in zip(rows, history.records, strict=True):
        shares = record.shares
        assert row["gmar/compute_seconds"] == pytest.approx(record.seconds, rel=1e-3)
        assert row["gmar/collapsed_heads"] == len(record.flagged)
        assert row["gmar/importance_min"] == pytest.approx(4 * shares.min(), rel=1e-3)
        entropy = -(shares * np.log(shares)).sum(-1)
        assert row["gmar/effective_heads"] == pytest.approx(np.exp(entropy).mean(), rel=1e-3)
        assert row["gmar_layers/effective_heads_L01"] == pytest.approx(np.exp(entropy[1]), rel=1e-3)
        assert row["gmar_layers/importance_L00"] == pytest.approx(record.importance[0].sum(), rel=1e-3)
        assert row["gmar_heads/L01_H02"] == pytest.approx(4 * shares[1, 2], rel=1e-3)
        if record.drift:
            expected = 1 - np.mean(record.drift["rank_correlation_previous"])
            assert row["gmar/heatmap_drift"] == pytest.approx(expected, abs=1e-3)


def test_pictures_are_files_that_show_something(wandb_run):
    run, folder, _ = wandb_run
    row = run.rows("gmar/heatmaps")[-1]
    heatmaps = row["gmar/heatmaps"]
    assert heatmaps["count"] == 3
    assert heatmaps["captions"][0].startswith("#0 Bär → ")
    assert heatmaps["captions"][0].endswith(f"step {row['trainer/global_step']}")
    for name in heatmaps["filenames"]:
        pixels = np.asarray(Image.open(folder / "files" / name))
        assert pixels.dtype == np.uint8
        assert pixels.std() > 10, "black or flat"
    for key in ("gmar/head_importance", "gmar/head_evolution"):
        assert np.asarray(Image.open(folder / "files" / row[key]["path"])).std() > 10
    assert len(run.rows("gmar/inputs")) == 1
    assert sum(run.rows("gmar/importance")[-1]["gmar/importance"]["values"]) == 8  # every head once


def test_another_form_of_the_map_is_logged_on_request(wandb_run):
    run, folder, history = wandb_run
    rows = run.rows("gmar/heatmaps_paper")
    assert [row["trainer/global_step"] for row in rows] == history.steps.tolist()
    assert not run.rows("gmar/heatmaps_flow")
    kinds = [rows[-1][name] for name in ("gmar/heatmaps", "gmar/heatmaps_paper")]
    assert kinds[0]["captions"] == kinds[1]["captions"]
    for index, names in enumerate(zip(*(kind["filenames"] for kind in kinds), strict=True)):
        pair = [np.asarray(Image.open(folder / "files" / name)).astype(float) for name in names]
        assert np.abs(pair[0] - pair[1]).mean() > 1, index
        drawn = overlay(history_inputs(history)[index], history.heatmaps(history.steps[-1], "paper")[index])
        assert np.abs(pair[1] - drawn).mean() < 4  # JPEG, and maps of 8 bits


def history_inputs(history):
    return [np.asarray(Image.open(path).convert("RGB")) for path in history.input_paths(history.segment)]


def test_a_newly_flagged_head_has_one_picture_at_the_step_of_its_alert(wandb_run):
    run, folder, history = wandb_run
    (row,) = run.rows("gmar_flagged/L01_H01")
    (collapse,) = [event for event in history.events if event["kind"] == "collapsed"]
    assert row["trainer/global_step"] == collapse["step"]
    picture = np.asarray(Image.open(folder / "files" / row["gmar_flagged/L01_H01"]["path"])).astype(int)
    assert picture.shape[1] > 3 * 160  # three photographs
    # before, now, sibling: the dead head's photographs are grey, the others are not
    colourful = np.ptp(picture, axis=2)
    rows = np.array_split(colourful, 3)
    assert rows[1].mean() < rows[0].mean() / 2
    assert rows[1].mean() < rows[2].mean() / 2


def test_contribution_stands_beside_importance(wandb_run):
    run, folder, _ = wandb_run
    rows = run.rows("gmar/head_contribution")
    assert len(rows) == len(run.rows("gmar/head_importance"))
    for key in ("gmar/head_contribution", "gmar/head_contribution_evolution"):
        assert np.asarray(Image.open(folder / "files" / rows[-1][key]["path"])).std() > 10


def test_the_maps_are_tested_at_both_ends(wandb_run):
    run, _, history = wandb_run
    for key in ("gmar/faithfulness_insertion_minus_deletion", "gmar/class_sensitivity", "gmar/randomisation"):
        steps = [row["trainer/global_step"] for row in run.rows(key)]
        assert steps == [history.steps[0], history.steps[-1]], key
        assert all(-1 <= row[key] <= 1 for row in run.rows(key))


def test_every_key_is_defined_by_its_exact_name(wandb_run):
    run, _, _ = wandb_run
    ours = {key for row in run.history for key in row if key.startswith("gmar") and "report" not in key}
    for key in ours - {"gmar/head_table"}:
        assert run.metrics[key].step_metric == "trainer/global_step", key
    assert run.metrics["gmar_heads/L00_H00"].options.hidden
    assert run.metrics["gmar_heads/L00_H00"].summary.none


def test_planted_collapse_is_alerted_once_and_summarised(wandb_run):
    run, _, history = wandb_run
    collapses = [event for event in history.events if event["kind"] == "collapsed"]
    assert [(event["layer"], event["head"]) for event in collapses] == [(1, 1)]
    assert len(run.alerts) == 1
    assert "blocks.1.attn" in run.alerts[0].text
    assert "Zeroing" in run.alerts[0].text  # confirmed by ablation
    assert abs(collapses[0]["ablation_logit"]) < 0.01 * abs(collapses[0]["control_logit"])  # nothing is left
    assert run.summary["gmar/collapsed_final"] == 1
    assert run.summary["gmar/first_collapse_step"] == collapses[0]["step"]
    assert run.summary["gmar/worst_head"] == "model.blocks.1.attn head 1"
    assert max(row["gmar/collapsed_heads"] for row in run.rows("gmar/collapsed_heads")) == 1


def test_table_report_and_config_at_the_end(wandb_run):
    run, folder, history = wandb_run
    (table_row,) = run.rows("gmar/head_table")
    table = json.loads((folder / "files" / table_row["gmar/head_table"]["path"]).read_text())
    assert table["columns"] == ["step", "layer", "head", "importance", "share", "flagged"]
    assert len(table["data"]) == len(history.records) * 8
    report = (folder / "files" / table_row["gmar/report"]["path"]).read_text()
    assert report == (history.dir / "report.html").read_text()
    assert run.config["gmar"]["norm"] == "l1" or json.loads(run.config["gmar"])["value"]["norm"] == "l1"


def test_wandbs_own_inspector_sees_the_same_rows(wandb_run):
    _, folder, history = wandb_run
    command = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json", str(folder)]
    printed = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert printed.returncode == 0, printed.stderr
    rows = [
        line for line in printed.stdout.splitlines() if "gmar/collapsed_heads" in line and '"history"' in line
    ]
    assert len(rows) == len(history.records)


def test_a_run_that_existed_before_the_logger(tmp_path, offline):
    run = wandb.init(project="test", dir=str(tmp_path))
    logger = WandbLogger(experiment=run)
    fit(
        tmp_path, logger, GMARCallback(every_n_train_steps=5, num_images=2, save_dir=tmp_path / "g"), steps=11
    )
    folder = Path(run.settings.sync_dir)
    wandb.finish()
    wandb.teardown()
    parsed = read_run(folder)
    steps = [row["trainer/global_step"] for row in parsed.rows("gmar/effective_heads")]
    assert steps == History.load(tmp_path / "g").steps.tolist() == [0, 4, 9, 10]
    assert parsed.metrics["gmar/effective_heads"].step_metric == "trainer/global_step"


def test_max_events_thins_pictures_and_never_numbers(tmp_path, offline):
    logger = WandbLogger(project="test", save_dir=tmp_path)
    callback = GMARCallback(
        every_n_train_steps=1, num_images=2, num_heatmaps=1, max_events=5, save_dir=tmp_path / "g"
    )
    fit(tmp_path, logger, callback, steps=20)
    folder = Path(logger.experiment.settings.sync_dir)
    wandb.finish()
    wandb.teardown()
    run = read_run(folder)
    assert len(run.rows("gmar/collapsed_heads")) == len(History.load(tmp_path / "g").records) == 20
    assert 3 <= len(run.rows("gmar/heatmaps")) <= 6


def test_many_images_in_one_list_are_cut_where_wandb_would_cut_them(tmp_path, offline):
    logger = WandbLogger(project="test", save_dir=tmp_path)
    images = torch.randn(112, 3, 16, 16)
    callback = GMARCallback(
        num_heatmaps=112, probe_batch=(images, torch.arange(112) % 4), save_dir=tmp_path / "g"
    )
    fit(tmp_path, logger, callback, steps=1)
    folder = Path(logger.experiment.settings.sync_dir)
    wandb.finish()
    wandb.teardown()
    assert {row["gmar/heatmaps"]["count"] for row in read_run(folder).rows("gmar/heatmaps")} == {108}


def test_tensorboard_gets_numbers_pictures_and_histogram_at_one_step(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    fit(tmp_path, logger, GMARCallback(every_n_train_steps=6, num_images=4, num_heatmaps=2), steps=20)
    events = EventAccumulator(logger.log_dir, size_guidance={"images": 0, "histograms": 0, "scalars": 0})
    events.Reload()
    record = History.load(Path(logger.log_dir) / "gmar")
    steps = record.steps.tolist()
    assert [event.step for event in events.Scalars("gmar/effective_heads")] == steps
    assert [event.step for event in events.Images("gmar/head_importance")] == steps
    assert [event.step for event in events.Images("gmar/heatmaps")] == steps
    assert [event.step for event in events.Histograms("gmar/importance")] == steps
    training = {event.step for event in events.Scalars("train/loss")}
    assert set(steps) <= training


def test_csv_has_constant_columns(tmp_path):
    logger = CSVLogger(tmp_path)
    fit(tmp_path, logger, GMARCallback(every_n_train_steps=6, num_images=4), steps=20)
    rows = list(csv.DictReader((Path(logger.log_dir) / "metrics.csv").open()))
    ours = [row for row in rows if row.get("gmar/effective_heads")]
    record = History.load(Path(logger.log_dir) / "gmar")
    assert [int(row["step"]) for row in ours] == record.steps.tolist()
    filled = [{key for key, value in row.items() if value and key.startswith("gmar")} for row in ours]
    assert all(columns == filled[0] for columns in filled)


def test_faithfulness_is_logged_at_every_second_probe_under_constant_columns(tmp_path):
    logger = CSVLogger(tmp_path)
    fit(tmp_path, logger, GMARCallback(every_n_train_steps=6, num_images=4, faithfulness_every=2), steps=20)
    rows = list(csv.DictReader((Path(logger.log_dir) / "metrics.csv").open()))
    ours = [row for row in rows if row["gmar/effective_heads"]]
    for value in ("insertion_minus_deletion", "average_drop"):
        for beside in ("", "_random", "_rollout"):
            column = [float(row[f"gmar/faithfulness_{value}{beside}"]) for row in ours]
            assert [np.isfinite(number) for number in column] == [True, False, True, False, True]


def test_without_a_logger_there_is_the_record_and_the_report(tmp_path):
    fit(tmp_path, False, GMARCallback(every_n_train_steps=6, num_images=4), steps=20)
    assert History.load(tmp_path / "gmar").steps.tolist() == [0, 5, 11, 17, 19]
    assert (tmp_path / "gmar" / "report.html").stat().st_size > 10_000


class NumbersOnly(Logger):
    """Stands for MLflow and others: only the Logger interface."""

    def __init__(self):
        super().__init__()
        self.rows = []

    name, version = "numbers", "0"

    def log_metrics(self, metrics, step=None):
        assert all(isinstance(value, (int, float, torch.Tensor)) for value in metrics.values())
        self.rows.append((step, metrics))

    def log_hyperparams(self, params, *args, **kwargs):
        pass


def test_other_loggers_get_the_numbers_and_one_hint(tmp_path, recwarn):
    logger = NumbersOnly()
    fit(tmp_path, logger, GMARCallback(every_n_train_steps=6, num_images=4), steps=20)
    assert [step for step, metrics in logger.rows if "gmar/effective_heads" in metrics] == [0, 5, 11, 17, 19]
    hints = [str(w.message) for w in recwarn if "takes numbers only" in str(w.message)]
    assert len(hints) == 1
    assert "NumbersOnly" in hints[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_image_without_labels_or_names(tmp_path, offline, dtype):
    logger = WandbLogger(project="test", save_dir=tmp_path)
    callback = GMARCallback(probe_batch=(torch.randn(1, 3, 16, 16).to(dtype),), save_dir=tmp_path / "g")
    fit(tmp_path, logger, callback, steps=3)
    folder = Path(logger.experiment.settings.sync_dir)
    wandb.finish()
    wandb.teardown()
    row = read_run(folder).rows("gmar/heatmaps")[-1]
    pixels = np.asarray(Image.open(folder / "files" / row["gmar/heatmaps"]["filenames"][0]))
    assert pixels.std() > 10
    assert row["gmar/heatmaps"]["captions"][0].startswith("#0 ")


def test_pictures_are_drawn_and_saved_only_when_they_are_due(tmp_path, monkeypatch):
    from gmar_lightning.show import publisher

    drawn = []
    draw = publisher.pictures
    monkeypatch.setattr(publisher, "pictures", lambda *args, **more: drawn.append(1) or draw(*args, **more))
    callback = GMARCallback(
        every_n_train_steps=1,
        num_images=2,
        num_heatmaps=1,
        max_events=5,
        save_dir=tmp_path / "g",
        on_error="raise",
    )
    fit(tmp_path, False, callback, steps=20)
    probes = len(History.load(tmp_path / "g").records)
    assert probes == 20
    assert 3 <= len(drawn) <= 6
    assert len(list((tmp_path / "g" / "heatmaps").iterdir())) == len(drawn)
    assert len(list((tmp_path / "g" / "maps").iterdir())) == probes  # the numbers behind them are all there
