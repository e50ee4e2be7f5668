"""One callback, several modules: each with its own record, names and flags; and errors that say which would work."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional

from gmar_lightning import GMARCallback, History, UnsupportedModelError, gmar
from gmar_lightning.arguments import ConfigurationError
from gmar_lightning.show import keys
from gmar_lightning.targets import Similarity
from tests.helpers.networks import ViT, pictures, seeded
from tests.helpers.tiny import Classifier, fit, loaders, state_of, vit, watcher

PAIR = ["student", "towers.teacher"]


class Distilled(Classifier):
    """A student, and a teacher that is its moving average; one head of the student loses its way out."""

    def __init__(self) -> None:
        super().__init__()
        self.student = seeded(vit)
        self.towers = nn.ModuleDict({"teacher": copy.deepcopy(self.student)})
        self.net = nn.Identity()

    def forward(self, images: Tensor) -> Any:
        return {"student": self.student(images), "teacher": self.towers["teacher"](images)}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.global_step >= 24:
            with torch.no_grad():
                self.student.blocks[1].attn.proj.weight[:, 8:] = 0
        return functional.cross_entropy(self.student(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", functional.cross_entropy(self.student(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.student.parameters(), 1e-3)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("pair")
    torch.manual_seed(3)
    module, heard = Distilled(), []
    callback = watcher(
        folder,
        module=PAIR,
        every_n_train_steps=2,
        on_collapse=lambda trainer, module, events: heard.extend(events),
        faithfulness_every=None,
    )
    keep = ModelCheckpoint(folder, save_last=True)
    trainer, rows = fit(
        folder, module, loaders(), callbacks=[callback, keep], max_epochs=7, enable_checkpointing=True
    )
    return folder, module, trainer, rows, heard, callback


def test_each_module_has_its_own_record(run: Any) -> None:
    folder, module, _, _, _, callback = run
    histories = [History.load(folder / "gmar" / path) for path in PAIR]
    assert not (folder / "gmar" / "run.json").exists()
    assert histories[0].steps.tolist() == histories[1].steps.tolist()
    for path, history, watch in zip(PAIR, histories, callback.watches, strict=True):
        assert history.run["settings"]["module"] == path
        assert (history.dir / "report.html").is_file()
        assert history.layers == ["blocks.0.attn", "blocks.1.attn"]
        probe = watch.prober.probe
        last = gmar(module.get_submodule(path), probe.images).importance.mean(0)
        torch.testing.assert_close(
            torch.tensor(history.records[-1].importance, dtype=torch.float32), last, rtol=1e-3, atol=1e-9
        )


def test_flags_name_the_module(run: Any) -> None:
    folder, _, trainer, _, heard, _ = run
    student, teacher = (History.load(folder / "gmar" / path) for path in PAIR)
    assert [(e["layer"], e["head"]) for e in student.events if e["kind"] == "collapsed"] == [(1, 1)]
    assert not teacher.events
    assert {event.layer_name for event in heard} == {"student.blocks.1.attn"}
    assert "student.blocks.1.attn" in heard[0].message
    assert trainer.callback_metrics["gmar/student/collapsed_heads"] == 1
    assert trainer.callback_metrics["gmar/towers.teacher/collapsed_heads"] == 0


def test_each_module_has_its_own_logged_names(run: Any) -> None:
    logged = {name for _, row in run[3].rows for name in row if name.startswith("gmar")}
    assert logged
    for path in PAIR:
        assert {keys.under(path, keys.COLLAPSED), keys.under(path, "gmar_layers/entropy_L01")} <= logged
    assert all(any(f"/{path}/" in name for path in PAIR) for name in logged)


def test_a_resumed_run_continues_both_records(run: Any, tmp_path: Path) -> None:
    folder = run[0]
    again = watcher(folder, module=PAIR, every_n_train_steps=2, faithfulness_every=None)
    before = [len(History.load(folder / "gmar" / path).records) for path in PAIR]
    fit(folder, Distilled(), loaders(), callbacks=[again], max_epochs=8, ckpt_path=str(folder / "last.ckpt"))
    for path, count in zip(PAIR, before, strict=True):
        history = History.load(folder / "gmar" / path)
        assert len(history.records) == count + 4
        assert history.run["segments"][-1]["segment"] == 0
    assert again.watches[0].prober.detector.flagged == [(1, 1)]


def test_training_goes_on_as_without(tmp_path: Path) -> None:
    digests = []
    for callbacks in ([], [watcher(tmp_path, module=PAIR, faithfulness_every=None)]):
        torch.manual_seed(3)
        module = Distilled()
        torch.manual_seed(4)
        trainer, rows = fit(tmp_path, module, loaders(), callbacks=callbacks, max_epochs=1)
        digests.append(state_of(trainer, module, rows)["weights and buffers"])
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"module": []}, "must be a dotted path or a list of them"),
        ({"module": ["a", "a"]}, "names a path twice"),
        (
            {"module": ["a", "b"], "target": {"a": 1}},
            "target is a mapping from path and has no entry for 'b'",
        ),
        ({"module": ["a", "b"], "inputs": {"b": tuple}}, "inputs .* no entry for 'a'"),
        ({"module": ["a"], "target": {"a": "best"}}, "target='best' is unknown"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        GMARCallback(**arguments)


class Tower(ViT):
    """Words to an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 24)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.features(words).mean(1))


class TwoTowers(Distilled):
    """An image and a text tower, compared: neither of them alone is the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = seeded(ViT, grid=(2, 2)), seeded(Tower, seed=1)

    def forward(self, images: Tensor, words: Tensor) -> Tensor:
        return (self.image(images) * self.text(words)).sum(-1, keepdim=True)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0], words_of(batch)).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", self.training_step(batch, batch_idx))


def words_of(batch: Any) -> Tensor:
    return (batch[1][:, None] + torch.arange(6)) % 11


def test_image_and_text_tower(tmp_path: Path) -> None:
    target = Similarity(torch.randn(5, generator=torch.Generator().manual_seed(0)), "a cat")
    callback = watcher(
        tmp_path,
        module=["image", "text"],
        target={"image": target, "text": "predicted"},
        inputs={"image": lambda batch: batch[0], "text": lambda batch: (words_of(batch),)},
    )
    fit(tmp_path, TwoTowers(), loaders(), callbacks=[callback], max_epochs=1)
    image, text = (History.load(tmp_path / "gmar" / path) for path in ("image", "text"))
    assert image.run["settings"]["target"] == "similarity to a cat"
    assert image.heatmaps(0).shape == (8, 2, 2)
    assert text.records[0].importance.shape == (3, 3)
    assert text.records[0].predictions


def refusal(model: nn.Module, *batch: Any, **how: Any) -> str:
    with pytest.raises(UnsupportedModelError) as caught:
        gmar(model, *batch, **how)
    return str(caught.value)


def test_errors_name_the_modules_that_would_work() -> None:
    images = pictures(3, 16, 16)
    said = refusal(Distilled(), images)
    assert "returned dict" in said
    assert "Would work: module='student', module='towers.teacher'." in said

    class Sum(Distilled):
        def forward(self, images: Tensor) -> Tensor:
            return self.student(images) + self.towers["teacher"](images)

    said = refusal(Sum(), images)
    assert "Would work: module='student', module='towers.teacher'." in said

    class Embeds(TwoTowers):
        def forward(self, images: Tensor, words: Tensor) -> Any:
            return {"image": self.image(images), "text": self.text(words)}

    pair = refusal(Embeds(), (images, torch.zeros(3, 6, dtype=torch.long)), inputs=tuple)
    assert "module='image' (on the images alone)" in pair
    inside = refusal(nn.ModuleDict({"net": Sum()}), images, module="net")
    assert "Would work: module='net.student', module='net.towers.teacher'." in inside
    none = refusal(nn.Sequential(nn.Conv2d(3, 8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten()), images)
    assert "No module inside it can be explained on these inputs." in none


def test_candidates_work(tmp_path: Path) -> None:
    for path in PAIR:
        assert gmar(Distilled(), pictures(2, 16, 16), module=path).heatmaps.shape == (2, 2, 2)


def test_the_callback_names_them_before_the_first_step(tmp_path: Path) -> None:
    class NoForward(Distilled):
        forward = LightningModule.forward

    said = r"Would work: module='student', module='towers\.teacher'"
    for module in (Distilled(), NoForward()):
        with pytest.raises((UnsupportedModelError, ConfigurationError), match=said):
            fit(tmp_path, module, loaders(), callbacks=[watcher(tmp_path)], num_sanity_val_steps=0)
        assert module.trainer.global_step == 0
    module = Distilled()
    module.towers["teacher"] = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 4))
    with pytest.raises(UnsupportedModelError, match=r"module='towers\.teacher': .*no attention seen"):
        fit(tmp_path, module, loaders(), callbacks=[watcher(tmp_path, module=PAIR)], num_sanity_val_steps=0)
