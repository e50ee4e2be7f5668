"""Batches of any kind through `inputs=`: micro-batches, rows and probes are those of each image alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from gmar_lightning import History, UnsupportedModelError, gmar
from gmar_lightning.explain.nested import joined_batches, rows_of
from gmar_lightning.targets import ClassLogit
from tests.helpers.networks import ViT, pictures, seeded
from tests.helpers.tiny import CLASSES, Images, fit, vit, watcher

IMAGES, TEXT = pictures(4), torch.randn(4, 6, generator=torch.Generator().manual_seed(5))


class Captioned(nn.Module):
    """Looks at the image in the light of a text embedding; its depth map is multiplied in."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.word = seeded(ViT), seeded(nn.Linear, 6, 3)

    def forward(self, image: Tensor, text: Tensor, depth: Tensor | None = None) -> Tensor:
        image = image + self.word(text)[:, :, None, None].tanh()
        return self.net(image if depth is None else image * depth)


class OfBatch(Captioned):
    """Takes a whole batch, as many LightningModules do."""

    def forward(self, batch: Mapping[str, Any]) -> Tensor:
        return super().forward(batch["views"]["image"], batch["text"])


class Alone(nn.Module):
    """`Captioned` of one fixed text, which takes an image and nothing else: the reference."""

    def __init__(self, row: int, depth: Tensor | None = None) -> None:
        super().__init__()
        self.model, self.row, self.depth = seeded(Captioned), row, depth

    def forward(self, image: Tensor) -> Tensor:
        return self.model(image, TEXT[self.row][None], self.depth)


DEPTH = torch.rand(4, 1, 32, 32, generator=torch.Generator().manual_seed(6)) + 0.5
NAMES = ["a", "b", "c", "d"]
WAYS = {
    "list batch, positional": (Captioned, [IMAGES, TEXT, NAMES], lambda b: (b[0], b[1])),
    "dict batch, keywords": (
        Captioned,
        {"x": IMAGES, "t": TEXT},
        lambda b: {"image": b["x"], "text": b["t"]},
    ),
    "batch of samples": (
        Captioned,
        [{"x": image, "t": text} for image, text in zip(IMAGES, TEXT, strict=True)],
        lambda b: (torch.stack([one["x"] for one in b]), torch.stack([one["t"] for one in b])),
    ),
    "forward(batch)": (
        OfBatch,
        {"views": {"image": IMAGES}, "text": TEXT, "names": NAMES},
        lambda b: ({k: v for k, v in b.items() if k != "names"},),
    ),
}


@pytest.mark.parametrize("micro_batch_size", [None, 3])
@pytest.mark.parametrize("way", WAYS)
def test_each_row_is_the_image_alone(way: str, micro_batch_size: int | None) -> None:
    build, batch, inputs = WAYS[way]
    found = gmar(seeded(build), batch, inputs=inputs, micro_batch_size=micro_batch_size)
    for row in range(4):
        alone = gmar(Alone(row), IMAGES[row : row + 1])
        torch.testing.assert_close(found.heatmaps[row], alone.heatmaps[0], rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(found.importance[row], alone.importance[0], rtol=1e-4, atol=1e-7)
        assert found.targets[row] == alone.targets[0]


def test_the_callable_says_which_input_is_the_image() -> None:
    class DepthFirst(Captioned):
        def forward(self, depth: Tensor, image: Tensor, text: Tensor) -> Tensor:
            return super().forward(image, text, depth)

    batch = (DEPTH, IMAGES, TEXT)
    found = gmar(seeded(DepthFirst), batch, inputs=lambda b: (tuple(b), 1))
    alone = gmar(Alone(2, DEPTH[2:3]), IMAGES[2:3])
    torch.testing.assert_close(found.heatmaps[2], alone.heatmaps[0], rtol=1e-4, atol=1e-7)
    with pytest.raises(ValueError, match=r"'2' are the images .* returned 0: \(4, 1, 32, 32\)"):
        gmar(seeded(DepthFirst), batch, inputs=lambda b: (tuple(b), 2))


def test_image_and_mask() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = seeded(ViT)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.net(x * mask[:, None])

    mask = torch.rand(4, 32, 32, generator=torch.Generator().manual_seed(7)) > 0.3
    found = gmar(Masked(), (IMAGES, mask), inputs=tuple, micro_batch_size=2)
    plain = gmar(seeded(ViT), IMAGES * mask[:, None])
    torch.testing.assert_close(found.heatmaps, plain.heatmaps)
    torch.testing.assert_close(found.importance, plain.importance)


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        (lambda batch: batch["image"], "inputs= failed on the batch: TypeError"),
        (lambda batch: 3, "inputs= returned int; expected what the forward takes"),
        (lambda batch: ("no tensor",), "no tensor among the inputs"),
        (lambda batch: (IMAGES, TEXT), "cannot be cut into images"),
    ],
)
def test_inputs_that_do_not_work(inputs: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        gmar(seeded(Captioned), [IMAGES, TEXT], inputs=inputs, micro_batch_size=2)


def test_batches_are_cut_and_joined() -> None:
    batch = {"x": IMAGES, "y": [torch.arange(4), NAMES], "scale": 2.0, "grid": torch.zeros(7, 2)}
    part = rows_of(batch, [3, 1], 4)
    assert part["y"][0].tolist() == [3, 1]
    assert part["y"][1] == ["d", "b"]
    assert part["scale"] == 2.0
    assert part["grid"].shape == (7, 2)
    assert torch.equal(part["x"], IMAGES[[3, 1]])
    whole = joined_batches([rows_of(batch, slice(0, 2), 4), rows_of(batch, slice(2, 4), 4)])
    assert torch.equal(whole["x"], IMAGES)
    assert whole["y"][1] == NAMES
    pairs = [(image, {"boxes": torch.zeros(2, 4)}) for image in pictures(2)]
    assert torch.equal(rows_of(pairs, [1], 2)[0][0], pairs[1][0])
    three = list(pictures(3))  # as many samples as channels
    assert torch.equal(rows_of(three, [2], 3)[0], three[2])


def test_a_target_per_image_follows_the_rows_of_a_process() -> None:
    target = ClassLogit([0, 1, 2, 3]).for_images([1, 3])
    assert target(torch.eye(4)[[1, 3]]).tolist() == [1.0, 1.0]


class Texts(Images):
    """A mapping per sample: image, text, label."""

    def __getitem__(self, index: int) -> Any:
        text = torch.randn(6, generator=torch.Generator().manual_seed(index))
        return {
            "img": self.images[index],
            "text": text,
            "label": self.classes[index],
            "depth": self.images[index],
        }


class Trained(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.word = seeded(vit), seeded(nn.Linear, 6, 3)

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        return self.net(image + self.word(text)[:, :, None, None].tanh())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return functional.cross_entropy(self(batch["img"], batch["text"]), batch["label"])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.0)


def image_and_text(batch: Any) -> dict[str, Tensor]:
    return {"image": batch["img"], "text": batch["text"]}


def text_loaders() -> tuple[DataLoader, DataLoader]:
    return DataLoader(Texts(8), 4), DataLoader(Texts(16, seed=1), 8)


@pytest.mark.parametrize("chosen", [None, "hardest"])
def test_the_callback_probes_whole_batches(chosen: str | None, tmp_path: Path) -> None:
    callback = watcher(
        tmp_path,
        inputs=image_and_text,
        micro_batch_size=3,
        probe_images=chosen,
        target="label",
        faithfulness_every=1,
    )
    module = Trained()
    fit(tmp_path, module, text_loaders(), callbacks=[callback], max_epochs=1)
    history, probe = History.load(tmp_path / "gmar"), callback.watches[0].prober.probe
    assert sorted(probe.labels.tolist()) == sorted([*range(CLASSES)] * 2) or chosen == "hardest"
    assert torch.equal(probe.images, probe.batch["img"])
    alone = [
        gmar(module, probe.part([row]), probe.labels[[row]], inputs=image_and_text).heatmaps[0]
        for row in range(8)
    ]
    np.testing.assert_allclose(
        history.heatmaps(int(history.steps[0])),
        torch.stack(alone).numpy(),
        atol=0.005 * float(max(a.max() for a in alone)),
    )
    assert np.isfinite(history.records[0].faithfulness["insertion_minus_deletion"])
    assert np.isfinite(history.records[0].faithfulness["class_sensitivity"])
    assert len(history.input_paths()) == 2
    changed = {**probe.batch, "text": probe.batch["text"] + 1}
    assert type(probe)(probe.images, probe.labels, batch=changed).fingerprint != probe.fingerprint


def test_a_probe_batch_of_their_own(tmp_path: Path) -> None:
    given = [IMAGES[:, :, :16, :16], TEXT]
    callback = watcher(tmp_path, inputs=lambda b: tuple(b), probe_batch=given)
    fit(tmp_path, Trained(), text_loaders(), callbacks=[callback], max_epochs=1)
    assert History.load(tmp_path / "gmar").records[0].importance is not None


def test_without_inputs_the_error_says_so(tmp_path: Path) -> None:
    with pytest.raises((TypeError, UnsupportedModelError), match="text"):
        fit(tmp_path, Trained(), text_loaders(), callbacks=[watcher(tmp_path)], max_epochs=1)
