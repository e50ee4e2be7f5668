"""Bad input: each a clear error before the first step. And what the record says of a good run."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from gmar_lightning import GMARCallback, History, UnsupportedModelError, gmar
from gmar_lightning.callback import ConfigurationError
from tests.helpers.tiny import CLASSES, SIZE, Classifier, Images, fit, images_of, loaders, watcher


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            {"every_n_train_steps": 5, "every_n_epochs": 1},
            "either every_n_train_steps or every_n_epochs, not both",
        ),
        ({"every_n_train_steps": 0}, "every_n_train_steps must be a whole number >= 1, got 0"),
        ({"every_n_train_steps": -3}, "every_n_train_steps must be a whole number >= 1, got -3"),
        ({"every_n_train_steps": 2.5}, "every_n_train_steps must be a whole number >= 1, got 2.5"),
        ({"every_n_train_steps": True}, "every_n_train_steps must be a whole number >= 1, got True"),
        ({"every_n_epochs": 0}, "every_n_epochs must be a whole number >= 1, got 0"),
        ({"num_images": 0}, "num_images must be a whole number >= 1, got 0"),
        ({"num_heatmaps": -1}, "num_heatmaps must be a whole number >= 1, got -1"),
        ({"max_events": 0}, "max_events must be a whole number >= 1, got 0"),
        ({"micro_batch_size": 0}, "micro_batch_size"),
        ({"norm": "l3"}, "l1.*l2.*uniform"),
        ({"rollout": "max"}, "gradient.*flow"),
        ({"log_rollouts": ["paper", "max"]}, "'max' is unknown.*gradient.*flow"),
        ({"log_rollouts": "max"}, "'max' is unknown.*gradient.*flow"),
        (
            {"target": "best"},
            r"target='best' is unknown; choose one of 'predicted', 'label' or a class index",
        ),
        ({"target": -1}, "target=-1 is unknown"),
        ({"target": True}, "target=True is unknown"),
        ({"on_collapse": "shout"}, "choose one of 'warn', 'alert', 'stop' or a callable"),
        ({"on_error": "ignore"}, "choose one of 'warn', 'raise'"),
        ({"mean": "grey"}, "mean must be one number per channel, got 'grey'"),
        ({"probe_batch": torch.zeros(3, 4)}, r"found position 0: tensor \(3, 4\)"),
        (
            {"probe_batch": {"pics": torch.zeros(2, 3, 8, 8)}},
            r"found pics: tensor .*name the images one of images",
        ),
        ({"probe_batch": {"images": [1, 2]}}, "found images: list"),
        ({"probe_batch": []}, "found nothing"),
        ({"probe_batch": torch.zeros(0, 3, 8, 8)}, "probe_batch is empty"),
        ({"probe_batch": (torch.zeros(3, 3, 8, 8), torch.arange(2))}, "3 images but 2 labels"),
        ({"probe_batch": torch.zeros(2, 3, 8, 8), "target": "label"}, 'target="label" needs labels'),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        GMARCallback(**arguments)


def refused(
    folder: Path, model: LightningModule, data: Any, kind: type[Exception], said: str, **changes: Any
) -> None:
    """Fitting ends before the first optimizer step."""
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(kind, match=said):
        fit(folder, model, data, callbacks=[watcher(folder, **changes)], num_sanity_val_steps=0)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_no_validation_and_no_probe_batch(tmp_path: Path) -> None:
    refused(
        tmp_path,
        Classifier(),
        (loaders()[0],),
        ConfigurationError,
        r"add one, or pass probe_batch=\(images, labels\)",
    )


def test_model_without_attention(tmp_path: Path) -> None:
    module = Classifier()
    module.net = nn.Sequential(
        nn.Conv2d(3, 8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES)
    )
    refused(tmp_path, module, loaders(), UnsupportedModelError, "attention", on_error="warn")


def test_module_without_forward(tmp_path: Path) -> None:
    class Stepper(Classifier):
        forward = LightningModule.forward

    refused(tmp_path, Stepper(), loaders(), ConfigurationError, r"defines no forward.*module=.*children: net")
    refused(
        tmp_path, Classifier(), loaders(), ConfigurationError, "'head' is not a submodule.*net", module="head"
    )


def test_class_index_that_the_model_does_not_have(tmp_path: Path) -> None:
    refused(tmp_path, Classifier(), loaders(), ValueError, "class 9.*4 classes", target=9, on_error="warn")


def test_validation_without_labels_when_labels_are_the_target(tmp_path: Path) -> None:
    module = Classifier()
    module.validation_step = lambda batch, batch_idx: None
    val = DataLoader(TensorDataset(images_of(8)), 4)
    said = "the validation batches have none"
    refused(tmp_path, module, (loaders()[0], val), ConfigurationError, said, target="label")


@pytest.mark.parametrize(
    ("collate", "said"),
    [
        (
            lambda items: {"pic": torch.zeros(2, 3, 8, 8), "y": torch.zeros(2).long()},
            "found pic: tensor .*, y: tensor",
        ),
        (
            lambda items: (torch.zeros(2, 5), torch.zeros(2)),
            r"position 0: tensor \(2, 5\), position 1: tensor",
        ),
        (lambda items: "text", "position 0: str"),
        (lambda items: 1 / 0, "cannot be read .ZeroDivisionError.*pass probe_batch="),
    ],
)
def test_batches_that_are_not_images(collate: Any, said: str, tmp_path: Path) -> None:
    val = DataLoader(Images(8), 4, collate_fn=collate)
    refused(tmp_path, Classifier(), (loaders()[0], val), ConfigurationError, said)


def test_loader_that_cannot_be_read_in_peace(tmp_path: Path) -> None:
    class Stream:
        def __init__(self) -> None:
            self.items = ((images_of(2), torch.arange(2), torch.arange(2)) for _ in range(9))

        def __iter__(self) -> Any:
            return self.items

    said = r"loader\.items, a live iterator that can be neither rewound nor copied.*Pass probe_batch"
    refused(tmp_path, Classifier(), (loaders()[0], Stream()), ConfigurationError, said)


def test_empty_validation_set(tmp_path: Path) -> None:
    val = DataLoader(TensorDataset(torch.zeros(0, 3, SIZE, SIZE)), 4)
    refused(tmp_path, Classifier(), (loaders()[0], val), ConfigurationError, "empty; pass probe_batch")


def test_fewer_validation_images_than_asked_for_is_said_once(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(tmp_path, Classifier(), loaders(val=6), callbacks=[watcher(tmp_path, num_images=32)])
    said = [str(warning.message) for warning in caught if "num_images" in str(warning.message)]
    assert said == ["GMARCallback: num_images=32, but the validation set has 6; using all"]
    assert History.load(tmp_path / "gmar").run["num_images"] == 6


def test_record_of_a_run(tmp_path: Path) -> None:
    module = Classifier()
    trainer, rows = fit(
        tmp_path,
        module,
        loaders(),
        callbacks=[watcher(tmp_path, target="label", class_names=["a", "b", "c", "d"])],
    )
    history = History.load(tmp_path / "gmar")
    assert history.run["class_names"] == ["a", "b", "c", "d"]
    assert history.run["labels"] == [0, 1, 2, 3, 0, 1, 2, 3]  # balanced
    assert history.layers == ["net.blocks.0.attn", "net.blocks.1.attn"]
    assert (history.heads, history.run["grid"]) == ([2, 2], [2, 2])
    last = history.records[-1]
    images = Images(16, seed=1).images[[0, 1, 2, 3, 4, 5, 6, 7]]
    alone = gmar(module, images, torch.tensor(history.run["labels"]))
    np.testing.assert_allclose(last.importance, alone.importance.mean(0), rtol=5e-4)  # 4 digits are stored
    np.testing.assert_allclose(
        history.heatmaps(last.step), alone.heatmaps, atol=float(alone.heatmaps.max()) / 500
    )
    assert list(last.predictions) == alone.logits.argmax(-1).tolist()
    assert last.metrics["val/accuracy"] == pytest.approx(float(trainer.callback_metrics["val/accuracy"]))
    assert last.seconds > 0
    for path in (tmp_path / "gmar" / "heatmaps").rglob("*.jpg"):
        assert Image.open(path).size[0] >= SIZE
    assert [step for step, _ in rows.of_gmar()] == history.steps.tolist()


def test_classifier_inside_the_module(tmp_path: Path) -> None:
    class Wrapped(Classifier):
        def forward(self, images: Tensor) -> Tensor:
            return self.net(images).softmax(-1)[:, None]

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.net(batch[0])

    fit(tmp_path, Wrapped(), loaders(), callbacks=[watcher(tmp_path, module="net")])
    assert History.load(tmp_path / "gmar").layers == ["blocks.0.attn", "blocks.1.attn"]


def test_argument_names_are_those_of_the_documentation() -> None:
    import inspect

    parameters = inspect.signature(GMARCallback).parameters
    defaults = {
        "every_n_train_steps": None, "every_n_epochs": None, "num_images": 32, "num_heatmaps": 8, "probe_batch": None,
        "module": None, "target": "predicted", "norm": "l1", "micro_batch_size": None, "on_collapse": "alert",
        "on_error": "warn", "mean": None, "std": None, "class_names": None, "log_per_head": False, "save_dir": None,
    }  # fmt: skip
    assert {name: parameters[name].default for name in defaults} == defaults
    assert GMARCallback().watches[0].schedule.interval == 100


def test_an_interval_that_adapts_is_said_and_recorded(tmp_path: Path, caplog: Any) -> None:
    callback = watcher(tmp_path, every_n_train_steps="auto", max_events=2)
    with caplog.at_level("INFO"):
        fit(tmp_path, Classifier(), loaders(), callbacks=[callback], max_epochs=4)
    history = History.load(tmp_path / "gmar")
    assert [record.global_step for record in history.records][:2] == [0, 20]
    assert history.run["settings"]["every"] == "auto: at most 1 % of the time"
    chosen = re.findall(r"every (\d+) steps keeps probes under 1 % of the time", caplog.text)
    assert int(chosen[-1]) == callback.watches[0].schedule.interval
    with pytest.raises(ValueError, match="every_n_train_steps='often' is unknown"):
        GMARCallback(every_n_train_steps="often")  # type: ignore[arg-type]
