"""One training run with every logger at once, in an environment that has them all; then what each one kept.

`python -m tests.helpers.all_loggers FOLDER` writes the run there and `kept.json`: per service, what its own reader
found, as `{"steps": {key: [step, ...]}, "values": {key: [value, ...]}, "pictures": {key: [step, ...]},
"report": bool}`.
"""

from __future__ import annotations

import csv
import json
import os
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.loggers import CometLogger, CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import Logger

KEY = "gmar/effective_heads"


class TrackioLogger(Logger):
    """What a user writes for a service without a logger of its own: numbers, and `log_image`."""

    def __init__(self, project: str) -> None:
        super().__init__()
        import trackio

        self.trackio = trackio
        trackio.init(project=project, name="run", embed=False)

    @property
    def name(self) -> str:
        return "trackio"

    @property
    def version(self) -> str:
        return "run"

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        return None

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.trackio.log({name: float(value) for name, value in metrics.items()}, step=step)

    def log_image(self, key: str, images: list[np.ndarray], step: int, caption: list[str]) -> None:
        for index, (image, words) in enumerate(zip(images, caption, strict=True)):
            name = key if len(images) == 1 else f"{key}/{index:02d}"
            self.trackio.log({name: self.trackio.Image(image, caption=words)}, step=step)


def train(folder: Path) -> str:
    """Train with all of them; returns MLflow's name of the run."""
    import swanlab
    import trackio
    import wandb
    from swanlab.integration.pytorch_lightning import SwanLabLogger

    from tests.helpers.tiny import Classifier, fit, loaders, watcher

    mlflow_logger = MLFlowLogger(
        "gmar", tracking_uri=f"sqlite:///{folder}/mlflow.db", artifact_location=(folder / "mlflow").as_uri()
    )
    comet_logger = CometLogger(online=False, project="gmar", offline_directory=str(folder / "comet"))
    import comet_ml

    # With `online=False`, Lightning 2.6 starts an experiment that is switched off altogether and keeps nothing.
    comet_logger._experiment = comet_ml.OfflineExperiment(
        project_name="gmar",
        offline_directory=str(folder / "comet"),
        log_code=False,
        log_env_details=False,
        auto_output_logging=False,  # three services that each wrap the console end in a recursion
    )
    wandb_logger = WandbLogger(project="gmar", save_dir=folder, offline=True)
    loggers_ = [
        CSVLogger(folder, name="csv"), TensorBoardLogger(folder, name="tensorboard"),
        wandb_logger, mlflow_logger, comet_logger,
        SwanLabLogger(project="gmar", mode="offline", log_dir=str(folder / "swanlab")),
        TrackioLogger("gmar"),
    ]  # fmt: skip
    torch.manual_seed(0)
    fit(
        folder, Classifier(), loaders(), callbacks=[watcher(folder, on_error="warn")], max_epochs=1,
        logger=loggers_,
    )  # fmt: skip
    comet_logger.experiment.end()
    swanlab.finish()
    trackio.finish()
    wandb.finish()
    wandb.teardown()
    return str(mlflow_logger.run_id)


class Kept:
    """What one service kept: steps and values of one number, steps of each kind of picture, and the rest."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.values: list[float] = []
        self.pictures: dict[str, set[int]] = {}
        self.seen: dict[str, bool] = {}

    def number(self, step: int, value: float) -> None:
        self.steps.append(int(step))
        self.values.append(float(value))

    def picture(self, key: str, step: int) -> None:
        # Services that take one picture at a time get a key per image.
        kind = key.rsplit("/", 1)[0] if key.rsplit("/", 1)[-1].isdigit() else key
        self.pictures.setdefault(kind, set()).add(int(step))

    def plain(self) -> dict[str, Any]:
        pictures = {key: sorted(steps) for key, steps in self.pictures.items()}
        return {"steps": self.steps, "values": self.values, "pictures": pictures, **self.seen}


def csv_kept(folder: Path) -> Kept:
    kept = Kept()
    with next(folder.glob("csv/version_0/metrics.csv")).open() as file:
        for row in csv.DictReader(file):
            if row[KEY]:
                kept.number(int(row["step"]), float(row[KEY]))
    return kept


def tensorboard_kept(folder: Path) -> Kept:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    kept = Kept()
    events = EventAccumulator(str(folder / "tensorboard" / "version_0"), {"images": 0, "scalars": 0})
    events.Reload()
    for event in events.Scalars(KEY):
        kept.number(event.step, event.value)
    for key in events.Tags()["images"]:
        for event in events.Images(key):
            kept.picture(key, event.step)
    kept.seen["histogram"] = bool(events.Tags()["histograms"])
    return kept


def wandb_kept(folder: Path) -> Kept:
    from tests.helpers.wandb_reader import read_run

    kept = Kept()
    run = read_run(next(folder.glob("wandb/offline-run-*")))
    for row in run.rows(KEY):
        kept.number(row["trainer/global_step"], row[KEY])
    for row in run.history:
        for key, value in row.items():
            if isinstance(value, dict) and value.get("_type", "").startswith("image"):
                kept.picture(key, row["trainer/global_step"])
    kept.seen["report"] = bool(run.rows("gmar/report"))
    kept.seen["histogram"] = bool(run.rows("gmar/importance"))
    kept.seen["tables"] = bool(run.rows("gmar/images"))
    kept.seen["artefacts"] = {artifact.type for artifact in run.artifacts} >= {"gmar-report", "gmar-record"}
    return kept


def mlflow_kept(folder: Path, run: str) -> Kept:
    from mlflow.tracking import MlflowClient

    kept, client = Kept(), MlflowClient(f"sqlite:///{folder}/mlflow.db")
    for metric in client.get_metric_history(run, KEY):
        kept.number(metric.step, metric.value)
    for file in client.list_artifacts(run, "images"):
        # `gmar~heatmaps~00+step+7+timestamp+...`, the names by which its page finds images with steps
        key, _, step = Path(file.path).name.split("+")[:3]
        kept.picture(key.replace("~", "/"), int(step))
    kept.seen["report"] = [file.path for file in client.list_artifacts(run, "gmar")] == ["gmar/report.html"]
    kept.seen["summary"] = "gmar/collapsed_ever" in client.get_run(run).data.tags
    return kept


def comet_kept(folder: Path) -> Kept:
    kept = Kept()
    with zipfile.ZipFile(next(folder.glob("comet/*.zip"))) as archive:
        messages = [json.loads(line) for line in archive.read("messages.json").splitlines()]
    for message in messages:
        content = message["payload"]
        if message["type"] == "metric_msg" and content["metric"]["metricName"] == KEY:
            kept.number(content["metric"]["step"], content["metric"]["metricValue"])
        elif message["type"] == "file_upload" and content.get("upload_type") == "visualization":
            kept.picture(content["additional_params"]["figName"], content["additional_params"]["step"])
    kept.seen["report"] = any(message["type"] == "html" for message in messages)
    return kept


def swanlab_kept(folder: Path) -> Kept:
    from swanlab.proto.swanlab.record.v1 import record_pb2
    from swanlab.sdk.internal.core_python.store import DataStoreReader

    kept, reader = Kept(), DataStoreReader()
    reader.open(next(folder.glob("swanlab/run-*/run-*.swanlab")))
    for data in reader:
        record = record_pb2.Record()
        record.ParseFromString(data)
        if record.HasField("scalar") and record.scalar.key == KEY:
            kept.number(record.scalar.step, record.scalar.value.number)
        elif record.HasField("media"):
            kept.picture(record.media.key, record.media.step)
            kept.seen["captions"] = all("step" in item.caption for item in record.media.value.items)
    reader.close()
    return kept


def trackio_kept(folder: Path) -> Kept:
    from trackio.sqlite_storage import SQLiteStorage

    kept = Kept()
    for row in SQLiteStorage.get_logs("gmar", "run"):
        if KEY in row:
            kept.number(row["step"], row[KEY])
        for key, value in row.items():
            if isinstance(value, dict) and value.get("_type") == "trackio.image":
                kept.picture(key, row["step"])
    return kept


def main(folder: Path) -> None:
    os.environ.update(TRACKIO_DIR=str(folder / "trackio"), WANDB_SILENT="true", WANDB_MODE="offline")
    run = train(folder)
    kept = {
        "CSVLogger": csv_kept(folder),
        "TensorBoardLogger": tensorboard_kept(folder),
        "WandbLogger": wandb_kept(folder),
        "MLFlowLogger": mlflow_kept(folder, run),
        "CometLogger": comet_kept(folder),
        "SwanLabLogger": swanlab_kept(folder),
        "log_image (Trackio)": trackio_kept(folder),
    }
    plain = {name: found.plain() for name, found in kept.items()}
    (folder / "kept.json").write_text(json.dumps(plain, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
