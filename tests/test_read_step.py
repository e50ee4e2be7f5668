"""`read="step"`: what training steps show is recorded, is right, is kept apart from probes, and changes no step."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch.nn import functional

from gmar_lightning import History, UnsupportedModelError
from gmar_lightning.arguments import ConfigurationError
from gmar_lightning.callback import GMARCallback
from gmar_lightning.show.compare import compare
from gmar_lightning.show.report import write_report
from tests.helpers.reference import materialised
from tests.helpers.tiny import Classifier, fit, loaders, run_and_digest, watcher
from tests.test_undisturbed import Checkpointed, Regularised, TwoOptimizers, accumulated


def reader(folder: Path, **changes: Any) -> GMARCallback:
    return watcher(folder, read="step", **changes)


class Kept(Classifier):
    """Keeps the model and the batch of every forward in training."""

    def __init__(self, **changes: Any) -> None:
        super().__init__(**changes)
        self.kept: list[tuple[Any, Any, Any]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.kept.append((copy.deepcopy(self.net), batch[0].clone(), batch[1].clone()))
        return super().training_step(batch, batch_idx)


def expected(batches: list[tuple[Any, Any, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Importance and contribution of the loss of each image, mean over the images, by maps that are held."""
    norms, parts = [], []
    for net, images, labels in batches:
        maps: list[Any] = []
        with materialised(maps):
            losses = functional.cross_entropy(net(images), labels, reduction="none")
            grads = torch.autograd.grad(losses.sum(), maps)
        norms.append(torch.stack([grad.square().sum((-2, -1)).sqrt() for grad in grads], 1))
        parts.append(torch.stack([(g * a).sum((-2, -1)).abs() for g, a in zip(grads, maps, strict=True)], 1))
    return tuple(torch.cat(each).mean(0).detach().numpy() for each in (norms, parts))  # type: ignore[return-value]


@pytest.mark.parametrize("batches", [1, 3])
def test_the_record_is_what_autograd_finds_of_the_loss(batches: int, tmp_path: Path) -> None:
    module = Kept()
    fit(
        tmp_path, module, loaders(), callbacks=[reader(tmp_path)], max_epochs=2,
        accumulate_grad_batches=batches,
    )  # fmt: skip
    history = History.load(tmp_path / "gmar")
    per_epoch = len(loaders()[0])
    steps = [
        list(range(epoch * per_epoch + first, epoch * per_epoch + min(first + batches, per_epoch)))
        for epoch in range(2)
        for first in range(0, per_epoch, batches)
    ]
    assert [record.global_step for record in history.records] == [1, *range(3, len(steps) + 1, 3)]
    for record in history.records:
        importance, contribution = expected([module.kept[at] for at in steps[record.global_step - 1]])
        np.testing.assert_allclose(record.importance, importance, rtol=6e-4)
        # packed in 8 bits
        np.testing.assert_allclose(record.signals["contribution"], contribution, rtol=0.06)
        assert record.source == "step"
        assert not record.maps
    assert history.layers == ["net.blocks.0.attn", "net.blocks.1.attn"]


ROWS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "gradient accumulation": accumulated(),
    "validation in mid-accumulation": accumulated(val_check_interval=4),
    "gradient checkpointing": {"module": Checkpointed},
    "dropout and stochastic depth": {"module": Regularised},
    "manual optimization, two optimizers": {"module": TwoOptimizers},
}


SLOW = {"validation in mid-accumulation", "dropout and stochastic depth"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in ROWS])
def test_the_run_is_the_same(name: str, tmp_path: Path) -> None:
    settings = dict(ROWS[name])
    module = settings.pop("module", Classifier)
    with_it, trainer, _ = run_and_digest(tmp_path, module, loaders, lambda: [reader(tmp_path)], **settings)
    without, _, _ = run_and_digest(tmp_path, module, loaders, **settings)
    assert with_it == without
    records = History.load(tmp_path / "gmar").records
    assert len(records) >= 2
    assert all(record.failure is None and np.isfinite(record.importance).all() for record in records)
    assert "gmar_step/collapsed_heads" in trainer.callback_metrics


def test_probes_and_steps_side_by_side_stay_apart(tmp_path: Path) -> None:
    """Two callbacks in one run: other names, other folders, other records; the run is the same."""

    def both() -> list[GMARCallback]:
        return [watcher(tmp_path), reader(tmp_path, save_dir=tmp_path / "steps", log_per_head=True)]

    with_them, trainer, rows = run_and_digest(tmp_path, TwoOptimizers, loaders, both)
    without, _, _ = run_and_digest(tmp_path, TwoOptimizers, loaders)
    assert with_them == without
    probes, steps = History.load(tmp_path / "gmar"), History.load(tmp_path / "steps")
    assert probes.layers == steps.layers
    assert {record.source for record in probes.records} == {"probe"}
    assert {record.source for record in steps.records} == {"step"}
    assert all(record.failure is None for record in (*probes.records, *steps.records))
    alone = tmp_path / "alone"
    run_and_digest(alone, TwoOptimizers, loaders, lambda: [reader(alone)])
    # a probe in the middle of a step that is read leaves its numbers alone
    for ours, its in zip(steps.records, History.load(alone / "gmar").records, strict=True):
        np.testing.assert_array_equal(ours.importance, its.importance)
    logged = [set(row) for _, row in rows.rows]
    of_steps = [row for row in logged if any(name.startswith("gmar_step") for name in row)]
    assert of_steps
    assert all(name.startswith("gmar_step") for row in of_steps for name in row if name.startswith("gmar"))
    assert {"gmar_step_layers/importance_L00", "gmar_step_heads/L00_H00"} <= set.union(*of_steps)
    assert not any("entropy" in name or "seconds" in name for row in of_steps for name in row)
    assert {"gmar/collapsed_heads", "gmar_step/collapsed_heads"} <= set(trainer.callback_metrics)
    with pytest.raises(ValueError, match="not comparable"):
        write_report([tmp_path / "gmar", tmp_path / "steps"])


def test_the_report_of_steps_says_so_and_has_no_pictures(tmp_path: Path, capsys: Any) -> None:
    fit(tmp_path, Classifier(), loaders(), callbacks=[reader(tmp_path)])
    page = (tmp_path / "gmar" / "report.html").read_text()
    assert '"read":"training steps"' in page
    assert "steps read" in capsys.readouterr().out
    assert not (tmp_path / "gmar" / "inputs").exists()
    assert compare([History.load(tmp_path / "gmar")])
    line = json.loads((tmp_path / "gmar" / "history.jsonl").read_text().splitlines()[0])
    assert (line["source"], line["maps"]) == ("step", None)


def test_the_detector_is_fed(tmp_path: Path) -> None:
    class Dead(Classifier):
        """From the tenth step on, a head's output reaches nothing."""

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.global_step == 10:
                with torch.no_grad():
                    self.net.blocks[0].attn.proj.weight[:, :8] = 0
            return super().training_step(batch, batch_idx)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(
            tmp_path, Dead(), loaders(), max_epochs=4,
            callbacks=[reader(tmp_path, every_n_train_steps=1)],
        )  # fmt: skip
    events = History.load(tmp_path / "gmar").events
    assert [(e["kind"], e["layer"], e["head"]) for e in events if e["kind"] == "collapsed"] == [
        ("collapsed", 0, 0)
    ]


def test_a_resumed_run_goes_on_and_one_that_is_read_otherwise_begins_anew(tmp_path: Path) -> None:
    trainer, _ = fit(tmp_path, Classifier(), loaders(), callbacks=[reader(tmp_path)], max_epochs=1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = {"max_epochs": 2, "ckpt_path": str(tmp_path / "a.ckpt")}
    fit(tmp_path, Classifier(), loaders(), callbacks=[reader(tmp_path)], **again)
    assert [record.global_step for record in History.load(tmp_path / "gmar").records] == [1, 3, 6, 9, 12, 15]
    with pytest.warns(UserWarning, match='read="step" before and is read="probe" now'):
        fit(tmp_path, Classifier(), loaders(), callbacks=[watcher(tmp_path)], **again)
    history = History.load(tmp_path / "gmar")
    assert history.records[0].global_step == len(loaders()[0])
    assert {record.source for record in history.records} == {"probe"}
    assert History.load(tmp_path / "gmar" / "previous_01").records[0].source == "step"


class ByHand(Classifier):
    """Attention without the fused function, which nothing can be read off."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.net.blocks:
            block.attn.fused_attn = False


def test_a_model_without_the_fused_function_fails_by_name_and_trains_on(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r'scaled_dot_product_attention.*Use read="probe"'):
        trainer, _ = fit(tmp_path, ByHand(), loaders(), callbacks=[reader(tmp_path, on_error="warn")])
    assert trainer.global_step == 2 * len(loaders()[0])
    records = History.load(tmp_path / "gmar").records
    assert [record.importance for record in records] == [None] * 3  # three in a row, and no more are tried
    assert all(record.failure for record in records)


def test_a_compiled_model_is_refused_before_the_first_step(tmp_path: Path) -> None:
    module = Classifier()
    module.net.blocks[0].compile(backend="eager")
    with pytest.raises(UnsupportedModelError, match="is compiled"):
        fit(tmp_path, module, loaders(), callbacks=[reader(tmp_path)])


@pytest.mark.parametrize(
    "arguments",
    [
        {"every_n_epochs": 1},
        {"every_n_train_steps": "auto"},
        {"probe_batch": torch.zeros(1, 3, 16, 16)},
        {"probe_images": "hardest"},
        {"target": 3},
        {"residual": 0.5},
    ],
)
def test_what_only_probes_can_do_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="read"):
        GMARCallback(read="step", **arguments)


def test_a_wrong_source_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="read='steps' is unknown"):
        GMARCallback(read="steps")  # type: ignore[arg-type]


def test_the_scale_of_mixed_precision_is_undone(tmp_path: Path) -> None:
    """float16 with a gradient scaler: the first step overflows, is left out of training and of the record."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-26)  # type: ignore[attr-defined]
    module = Kept()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(
            tmp_path, module, loaders(), callbacks=[reader(tmp_path)], max_epochs=1,
            plugins=[MixedPrecision("16-mixed", "cpu", scaler)],
        )  # fmt: skip
    records = History.load(tmp_path / "gmar").records
    assert [record.global_step for record in records] == [2, 3, 6]
    for record in records:
        importance, _ = expected([module.kept[record.global_step - 1]])
        np.testing.assert_allclose(record.importance, importance, rtol=0.05)


def test_a_part_of_what_is_trained_can_be_named(tmp_path: Path) -> None:
    class TwoNets(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.other = copy.deepcopy(self.net)

        def forward(self, images: Any) -> Any:
            return self.net(images) + self.other(images)

    fit(tmp_path, TwoNets(), loaders(), callbacks=[reader(tmp_path, module="net")], max_epochs=1)
    assert History.load(tmp_path / "gmar").layers == ["blocks.0.attn", "blocks.1.attn"]
