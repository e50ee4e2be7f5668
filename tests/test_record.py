"""The line of a record: exact where it says so, small, and the line of the version before is understood."""

from __future__ import annotations

import json
import shutil
import time
import warnings
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gmar_lightning import CollapseDetector, History
from gmar_lightning.monitor.events import HeadEvent
from gmar_lightning.monitor.packing import SIGNALS
from gmar_lightning.monitor.record import ProbeRecord, head_counts
from gmar_lightning.show.compare import compare
from gmar_lightning.show.report import write_report
from tests.helpers.tiny import Classifier, fit, loaders, watcher

BEFORE = Path(__file__).parent / "data" / "record_format_1"
LAYERS, HEADS = 24, 16


def full_record(step: int = 7, layers: int = LAYERS, heads: int = HEADS, images: int = 32) -> ProbeRecord:
    """A record with everything that a record can have, at the magnitudes of a real run."""
    rng = np.random.default_rng(step)
    signals = {name: rng.lognormal(0, 2, (layers, heads)) * 1e-3 for name in SIGNALS}
    signals["contribution_signed"] *= rng.choice([-1, 1], (layers, heads))
    signals["sink_token"] = rng.integers(0, 4097, (layers, heads)).astype(float)
    signals["token_similarity"] = np.repeat(rng.random((layers, 1)), heads, 1)
    correlation = rng.uniform(-1, 1, images)
    return ProbeRecord(
        step=step,
        global_step=step + 1,
        epoch=3,
        seconds=0.7012345,
        segment=1,
        signals=signals,
        targets=tuple(rng.integers(0, 1000, images).tolist()),
        predictions=tuple(rng.integers(0, 1000, images).tolist()),
        probabilities=tuple(rng.random(images).tolist()),
        scores=tuple(rng.normal(0, 9, images).tolist()),
        flagged=((1, 2),),
        drift={
            f"{name}_{other}": correlation
            for name in ("rank_correlation", "top20_overlap")
            for other in ("first", "previous")
        },
        metrics={"train/loss": 1.2345678901, "val/accuracy": 0.5},
        faithfulness={"average_drop": 0.25, "average_drop_random": float("nan")},
        verification={"mode": "same"},
        layers=tuple(f"blocks.{layer}.attn" for layer in range(layers)),
    )


def test_a_record_survives_its_line() -> None:
    event = HeadEvent(7, "collapsed", 1, 2, "b", 0.01, 0.2, 3, "collapsed.", ablation_loss=0.5)
    record = replace(full_record(), events=(event,))
    line = json.loads(json.dumps(record.to_json(), allow_nan=False))
    read = ProbeRecord.from_json(line)
    for name, table in record.signals.items():
        # 4 digits, whole numbers, single and half precision, or 8 bits between the extremes
        tolerance = {"digits": 5e-4, "u2": 0.0, "f4": 2**-24, "f2": 2**-11, "u1": 1e-6}[SIGNALS[name].stored]
        half_a_level = np.ptp(table) / 508 if SIGNALS[name].stored == "u1" else 0.0
        np.testing.assert_allclose(read.signals[name], table, rtol=tolerance, atol=half_a_level, err_msg=name)
    assert record.drift is not None
    assert read.drift is not None
    for name, values in record.drift.items():
        np.testing.assert_allclose(read.drift[name], values, atol=5e-4)
    np.testing.assert_allclose(read.probabilities, record.probabilities, rtol=5e-4)
    np.testing.assert_allclose(read.scores, record.scores, rtol=5e-4)
    same = (
        "step",
        "global_step",
        "epoch",
        "segment",
        "targets",
        "predictions",
        "events",
        "flagged",
        "metrics",
    )
    for name in (*same, "verification", "failure"):
        assert getattr(read, name) == getattr(record, name), name
    assert read.faithfulness is not None
    assert np.isnan(read.faithfulness["average_drop_random"])
    assert read.to_json() == line  # reading and writing again changes nothing
    beside = {"maps", "head_maps", "layers", "classes"}
    documented = (
        {item.name for item in fields(ProbeRecord)} - beside - {"stored_maps", "stored_head_maps", "signals"}
    )
    assert documented < line.keys()


def test_ragged_broken_and_unknown_signals() -> None:
    importance = np.array([[1e-30, 3.0, np.nan], [np.inf, np.nan, 5e9]])
    signals = {
        "importance": importance,
        "entropy": np.where(np.isfinite(importance), 0.5, np.nan),
        "yet_to_come": np.full((2, 3), 2.5),
    }
    signals["token_similarity"] = np.array([[0.5] * 3, [0.25] * 3])
    read = ProbeRecord.from_json(json.loads(json.dumps(ProbeRecord(0, 0, signals=signals).to_json())))
    expected = np.where(np.isfinite(importance), importance, np.nan)
    np.testing.assert_allclose(read.signals["importance"], expected, rtol=5e-4)
    np.testing.assert_allclose(read.signals["yet_to_come"], 2.5)
    np.testing.assert_allclose(read.signals["token_similarity"][0, :2], 0.5)
    assert head_counts(importance) == [2, 3]


def test_a_signal_that_is_missing_breaks_nothing(tmp_path: Path) -> None:
    history = History.create(tmp_path, {"layers": ["a"], "heads": [2]})
    history.append(ProbeRecord(0, 0, signals={"importance": np.ones((1, 2))}))
    history.append(ProbeRecord(1, 1, signals={}))
    for each in (history, History.load(tmp_path)):
        assert np.isnan(each.contribution()).all()
        assert np.isnan(each.values("sink_mass", 0)).all()
        assert [row["importance"] for row in each.rows()] == [1.0, 1.0]
        with pytest.raises(KeyError, match="nonsense"):
            each.values("nonsense")


def test_sixty_bytes_per_head_and_probe() -> None:
    line = json.dumps(full_record().to_json(), ensure_ascii=False, separators=(",", ":"))
    assert len(line) <= 60 * LAYERS * HEADS
    # The smallest Vision Transformer that people watch for long, ViT-B.
    smaller = json.dumps(
        full_record(layers=12, heads=12).to_json(), ensure_ascii=False, separators=(",", ":")
    )
    assert len(smaller) <= 60 * 144


def test_a_probe_costs_the_same_however_many_came_before(tmp_path: Path) -> None:
    """Exact counts, not times: tables are filled once, and no picture of the run is due."""
    history = History.create(tmp_path, {"layers": ["a"], "heads": [2]})
    reads: list[int] = []

    class Counted(History):
        def table(self, record: ProbeRecord, name: str) -> np.ndarray:
            reads.append(record.step)
            return super().table(record, name)

    history = Counted(None, {**history.run})
    for step in range(200):
        history.append(ProbeRecord(step, step, signals={"importance": np.full((1, 2), 1.0 + step)}))
        assert history.shares().shape == (step + 1, 1, 2)
    assert reads == list(range(200))
    np.testing.assert_array_equal(history.importance()[:, 0, 0], 1.0 + np.arange(200))
    history = Counted(None, history.run, history.records[:5])
    assert history.importance().shape == (5, 1, 2)


@pytest.mark.slow
def test_five_thousand_probes_are_read_in_three_seconds(tmp_path: Path) -> None:
    run = {"layers": list(full_record().layers), "heads": [HEADS] * LAYERS}
    history = History.create(tmp_path, run)
    text = "".join(
        json.dumps(full_record(step).to_json(), separators=(",", ":")) + "\n" for step in range(5000)
    )
    (history.dir / "history.jsonl").write_text(text)
    started = time.process_time()
    read = History.load(tmp_path)
    assert time.process_time() - started < 3.0
    assert read.importance().shape == (5000, LAYERS, HEADS)


@pytest.fixture
def before(tmp_path: Path) -> Path:
    """A copy of a record that the version before wrote, with its checkpoint."""
    return Path(shutil.copytree(BEFORE, tmp_path / "gmar"))


def raw_lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def test_a_record_of_format_1_is_read_whole(before: Path) -> None:
    history, lines = History.load(before), raw_lines(before)
    assert history.steps.tolist() == [line["step"] for line in lines]
    for record, line in zip(history.records, lines, strict=True):
        for name in ("importance", "entropy", "distance", "output_norm"):
            np.testing.assert_allclose(record.signals[name], line[name], rtol=1e-6)
        np.testing.assert_allclose(record.shares, line["shares"], rtol=1e-6)
        assert record.metrics == line["metrics"]
        assert list(record.predictions) == line["predictions"]
        assert [event.kind for event in record.events] == [event["kind"] for event in line["events"]]
        assert [list(cell) for cell in record.flagged] == line["flagged"]
        with np.load(before / "maps" / f"{line['maps']}.npz") as stored:
            expected = stored["heatmaps"].astype(np.float32) * stored["scale"].reshape(-1, 1, 1)
        np.testing.assert_array_equal(history.heatmaps(record.step), expected)
        np.testing.assert_array_equal(history.heatmaps(record.step, "paper"), expected)
    first, second = history.records[:2]
    assert first.faithfulness is not None
    assert second.faithfulness is not None
    assert first.faithfulness["average_drop"] == lines[0]["faithfulness"]["gmar/faithfulness_average_drop"]
    assert np.isnan(second.faithfulness["average_drop"])


def test_a_record_of_format_1_is_reported(before: Path, tmp_path: Path) -> None:
    page = write_report(before, tmp_path / "report.html").read_text("utf-8")
    assert "net.blocks.0.attn" in page
    assert "probes" in compare([History.load(before)])


@pytest.mark.parametrize("rollout", ["paper", "gradient"])
def test_a_run_of_format_1_goes_on(rollout: Any, before: Path, tmp_path: Path) -> None:
    """Also under what has become the default form since, whose maps are not compared with the others."""
    saved = torch.load(before / "last.ckpt", weights_only=True)
    step = saved["global_step"]
    kept = [line for line in raw_lines(before) if line["global_step"] <= step]
    callback = watcher(
        tmp_path,
        every_n_train_steps=2,
        num_images=8,
        num_heatmaps=2,
        faithfulness_every=5,
        rollout=rollout,
        detector=CollapseDetector(floor=0.3, drop=0.5),
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*takes numbers only.*|.*checkpoint.*|.*callbacks used.*")
        trainer, _ = fit(
            tmp_path,
            Classifier(),
            loaders(),
            callbacks=[callback],
            max_epochs=saved["epoch"] + 3,
            ckpt_path=str(before / "last.ckpt"),
        )
    assert trainer.global_step > step
    lines = raw_lines(before)
    assert lines[: len(kept)] == kept  # what was there is untouched, digit for digit
    assert len(lines) > len(kept)
    assert all("packed" in line for line in lines[len(kept) :])
    history = History.load(before)
    assert history.run["format"] == 2
    assert not any(record.failure for record in history.records)
    steps = [record.global_step for record in history.records]
    # The restored schedule: no gap, no duplicate across the seam.
    assert steps == [*range(0, trainer.global_step + 1, 2)]
    assert [segment["segment"] for segment in history.run["segments"]] == [0]
    assert (history.records[len(kept)].drift is not None) == (rollout == "paper")
    assert set(history.maps_of(history.records[0])) == {"paper"}
    assert next(iter(history.maps_of(history.records[-1]))) == rollout
    assert "</html>" in (before / "report.html").read_text("utf-8")
    (state,) = [value for key, value in saved["callbacks"].items() if key.startswith("GMARCallback")]
    assert callback.watches[0].prober.taken == state["session"]["taken"] + len(lines) - len(kept)
    ages = (
        {status.status for row in callback.detector.states for status in row} if callback.detector else set()
    )
    assert "warming" not in ages  # the detector went on where it was
