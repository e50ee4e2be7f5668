"""One run with every logger at once, against the real packages with local back ends."""

import inspect
import json
import os
import subprocess
import sys
import sysconfig
import tomllib
import venv
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from gmar_lightning import History
from gmar_lightning.show.loggers import adapter_for
from gmar_lightning.show.publication import Ending, Publication
from tests.helpers.tiny import Classifier, Rows, fit, loaders, watcher

ROOT = Path(__file__).parents[1]
EXTRA = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["loggers"]
PACKAGES = ("mlflow", "comet_ml", "swanlab", "trackio")
SHOWN = (
    "gmar/heatmaps",
    "gmar/head_importance",
    "gmar/head_evolution",
    "gmar/head_contribution",
    "gmar/head_contribution_evolution",
)


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """An interpreter that has the extra `loggers`: this one, or a new environment that borrows from it."""
    if all(find_spec(name) for name in PACKAGES):
        return Path(sys.executable)
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    borrowed = folder / "lib" / version / "site-packages" / "borrowed.pth"
    borrowed.write_text(sysconfig.get_path("purelib") + "\n")
    binary = folder / "bin" / "python"
    installed = subprocess.run(
        [binary, "-m", "pip", "install", "-q", *EXTRA, "trackio"], capture_output=True, text=True, timeout=900
    )
    if installed.returncode:
        pytest.skip(f"the extra `loggers` cannot be installed here: {installed.stderr[-300:]}")
    return binary


@pytest.fixture(scope="module")
def run(python, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    environment = {**os.environ, "COMET_DISABLE_AUTO_LOGGING": "1", "WANDB_MODE": "offline"}
    command = [python, "-m", "tests.helpers.all_loggers", folder]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return History.load(folder / "gmar"), json.loads((folder / "kept.json").read_text()), done.stderr


@pytest.mark.slow
def test_every_service_kept_what_the_record_says(run):
    history, kept, _ = run
    steps = history.steps.tolist()
    shares = history.shares()
    effective = np.exp(-(shares * np.log(shares)).sum(-1)).mean(-1)
    assert len(kept) == 7
    for name, found in kept.items():
        assert found["steps"] == steps, name
        # The record keeps four significant digits of importance; the loggers were given the number before that.
        assert found["values"] == pytest.approx(effective.tolist(), rel=1e-4), name
        expected = {} if name == "CSVLogger" else {**dict.fromkeys(SHOWN, steps), "gmar/inputs": steps[:1]}
        assert found["pictures"] == expected, name


@pytest.mark.slow
def test_what_only_some_of_them_can_show(run):
    _, kept, said = run
    for name in ("WandbLogger", "MLFlowLogger", "CometLogger"):
        assert kept[name]["report"], name
    assert kept["WandbLogger"]["tables"]
    assert kept["WandbLogger"]["artefacts"]
    assert kept["MLFlowLogger"]["summary"]
    assert kept["SwanLabLogger"]["captions"]
    assert "CSVLogger takes numbers only" in said
    assert said.count("takes numbers only") == 1
    assert "is left out" not in said  # no logger failed


class Refuses(Rows):
    """A service whose back end answers with an error."""

    def log_metrics(self, metrics, step=None):
        if any(name.startswith("gmar") for name in metrics):
            raise ConnectionError("403 from the service")


@pytest.mark.parametrize("place", [0, 1])
def test_a_logger_that_refuses_is_said_once_and_stops_nobody(tmp_path, recwarn, place):
    csv = CSVLogger(tmp_path)
    both = [csv]
    both.insert(place, Refuses())
    fit(
        tmp_path,
        Classifier(),
        loaders(),
        callbacks=[watcher(tmp_path, on_error="warn")],
        logger=both,
        max_epochs=1,
    )
    history = History.load(tmp_path / "gmar")
    assert len(history.records) == 4
    assert (tmp_path / "gmar" / "report.html").is_file()
    assert (Path(csv.log_dir) / "metrics.csv").read_text().count("\n") > 4
    said = [str(warning.message) for warning in recwarn if "Refuses failed" in str(warning.message)]
    assert len(said) == 1
    assert "403 from the service" in said[0]


class OwnLogger(Rows):
    """What a user writes to get the pictures into a service of their own."""

    def __init__(self):
        super().__init__()
        self.images = []

    def log_image(self, key, images, step, caption):
        self.images.append((key, step, [image.shape for image in images], caption))
        assert all(image.dtype == np.uint8 for image in images)


def test_any_logger_with_log_image_gets_pictures(tmp_path):
    logger = OwnLogger()
    fit(tmp_path, Classifier(), loaders(), callbacks=[watcher(tmp_path)], logger=logger, max_epochs=1)
    history = History.load(tmp_path / "gmar")
    for key in SHOWN:
        assert [step for name, step, _, _ in logger.images if name == key] == history.steps.tolist()
    heatmaps = [entry for entry in logger.images if entry[0] == "gmar/heatmaps"]
    assert all(len(shapes) == len(captions) == 2 for _, _, shapes, captions in heatmaps)
    assert heatmaps[-1][3][1].startswith("#1 ")
    assert [name for name, *_ in logger.images].count("gmar/inputs") == 1


def test_lightnings_own_service_is_called_as_its_logger_wants_it(tmp_path):
    # Its logger cannot be made without an account, so its calls are checked against its real signatures.
    from lightning.pytorch.loggers import LitLogger as Real

    calls = []

    class LitLogger:
        def __getattr__(self, name):
            def call(*args, **kwargs):
                inspect.signature(getattr(Real, name)).bind(self, *args, **kwargs)
                content = Path(args[0]).read_bytes()[:4] if name == "log_file" else args
                calls.append((name, content))

            if not hasattr(Real, name):
                raise AttributeError(name)
            return call

    picture = np.zeros((8, 8, 3), np.uint8)
    adapter = adapter_for(LitLogger())
    adapter.publish(
        Publication(7, {"gmar/a": 1.0}, heatmaps=[picture], captions=["x"], grids={"gmar/g": picture})
    )
    (tmp_path / "report.html").write_text("<html>")
    adapter.close(Ending(7, report=tmp_path / "report.html", summary={"gmar/collapsed_ever": 1}))
    assert [name for name, _ in calls] == ["log_metrics", "log_file", "log_file", "log_file", "log_metadata"]
    assert [content for name, content in calls if name == "log_file"] == [b"\x89PNG", b"\x89PNG", b"<htm"]


def test_no_service_is_imported_unless_it_is_in_use():
    services = ("wandb", "mlflow", "comet_ml", "swanlab", "litlogger", "tensorboard", "trackio")
    code = f"import sys, gmar_lightning.show.loggers; print([m for m in {services!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_missing_numbers_reach_csv_as_columns_and_nobody_else(tmp_path):
    shown = Publication(3, {"gmar/a": 1.0, "gmar/b": float("nan")})
    plain, own = Rows(), OwnLogger()
    for logger in (plain, own):
        adapter_for(logger).publish(shown)
    assert list(plain.rows[0][1]) == ["gmar/a", "gmar/b"]
    assert own.rows == [(3, {"gmar/a": 1.0})]
    assert torch.tensor(plain.rows[0][1]["gmar/b"]).isnan()
