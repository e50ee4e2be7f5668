"""Which images are drawn, and that drawing them leaves no trace."""

from __future__ import annotations

import ctypes
import dataclasses
import random
import threading
import types
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

from gmar_lightning.monitor.batches import unpack_batch
from gmar_lightning.monitor.probe import ProbeBatch, draw_probe
from tests.helpers.tiny import Images, images_of


def balanced(labels: list[int]) -> bool:
    counts = np.bincount(labels)
    return counts.max() - counts[counts > 0].min() <= 1


@pytest.mark.parametrize("says_labels", [True, False])
def test_classes_take_turns(says_labels: bool) -> None:
    data = Images(40, says_labels=says_labels)
    data.classes = torch.tensor([0] * 20 + [1] * 10 + [3] * 10)
    if says_labels:
        data.targets = data.classes.numpy()
    probe = draw_probe(DataLoader(data, 4), 9)
    assert probe.labels is not None
    assert probe.labels.tolist() == [0, 1, 3] * 3
    assert probe.available == 40
    subset = draw_probe(DataLoader(Subset(data, list(range(15, 40))), 4), 9)
    assert subset.labels is not None
    assert subset.labels.tolist() == [0, 1, 3] * 3


def test_lists_of_labels_are_not_classes() -> None:
    data = Images(8)
    data.targets = [[0, 1]] * 8
    assert len(draw_probe(DataLoader(data, 4), 4)) == 4


def test_all_there_are_when_there_are_fewer() -> None:
    assert len(draw_probe(DataLoader(Images(5), 2), 32)) == 5


def test_images_alone() -> None:
    probe = draw_probe(DataLoader(TensorDataset(images_of(8)), 4), 4)
    assert probe.labels is None
    assert len(probe) == 4


class Noisy(Images):
    """Random streams of every kind, a generator of its own, a counter, a lambda and a lock."""

    def __init__(self, lock: bool = False):
        super().__init__(16)
        self.own, self.python = np.random.default_rng(1), random.Random(1)
        self.torch = torch.Generator().manual_seed(1)
        self.asked, self.transform = (
            0,
            lambda image: image + torch.rand(1) + np.random.rand() + random.random(),
        )
        if lock:
            self.lock = threading.Lock()

    def __getitem__(self, index: int) -> Any:
        self.asked += 1
        image = self.transform(self.images[index]) + self.own.normal() + self.python.random()
        return image + torch.rand(1, generator=self.torch), self.classes[index], index

    def state(self) -> Any:
        own = [str(self.own.bit_generator.state), self.python.getstate(), self.torch.get_state().tolist()]
        return own, self.asked


def streams() -> Any:
    return torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()


def test_no_random_stream_moves_and_the_data_set_does_not_notice() -> None:
    data = Noisy()
    before = streams(), data.state()
    first = draw_probe(DataLoader(data, 4, shuffle=True), 8)
    assert (streams(), data.state()) == before
    torch.rand(5)
    assert draw_probe(DataLoader(data, 4), 8).fingerprint == first.fingerprint  # fixed inside


def test_data_set_that_cannot_be_copied_is_read_itself() -> None:
    before = streams()
    assert len(draw_probe(DataLoader(Noisy(lock=True), 4), 8)) == 8
    assert streams() == before


def test_large_arrays_are_shared_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    data = Images(400)
    seen = (ctypes.c_void_p * 1)()  # memory that the draw does not put back

    class Watched(Images):
        def __getitem__(self, index: int) -> Any:
            seen[0] = self.images.data_ptr()
            return super().__getitem__(index)

    data.__class__ = Watched
    draw_probe(DataLoader(data, 4), 4)
    assert seen[0] == data.images.data_ptr()


class Stream(IterableDataset):
    def __init__(self, lock: bool = False):
        self.position = 0
        if lock:
            self.lock = threading.Lock()

    def __iter__(self) -> Any:
        while self.position < 20:
            self.position += 1
            yield images_of(1, self.position)[0], self.position % 4


def test_stream_keeps_its_place() -> None:
    stream = Stream()
    probe = draw_probe(DataLoader(stream, 4), 4)
    assert stream.position == 0
    assert probe.labels is not None
    assert sorted(probe.labels.tolist()) == [0, 1, 2, 3]


def test_stream_that_cannot_be_copied_is_read_and_put_back() -> None:
    stream = Stream(lock=True)
    assert len(draw_probe(DataLoader(stream, 4), 4)) == 4
    assert stream.position == 0


def test_stream_that_can_be_neither_copied_nor_put_back_is_refused() -> None:
    class Pipe(IterableDataset):
        def __init__(self) -> None:
            self.items = (item for item in [(images_of(1)[0], 0)] * 9)

        def __iter__(self) -> Any:
            yield from self.items

    pipe = Pipe()
    with pytest.raises(ValueError, match=r"dataset\.items, a live iterator"):
        draw_probe(DataLoader(pipe, 4), 4)
    assert len(list(pipe.items)) == 9


@dataclasses.dataclass
class Sample:
    picture: Any
    klass: Any


class Pair(NamedTuple):
    first: Any
    second: Any


def test_batches_of_more_shapes() -> None:
    images, labels = images_of(4), torch.tensor([1, 0, 3, 3])
    one_hot = torch.eye(4)[labels]
    for batch in (
        Sample(images, labels), Pair(images, labels), (images, {"class": labels}), {"a": {"img": images},
        "y": labels},
        (images, one_hot), (images, 0.9 * one_hot + 0.025), (images, labels[:, None]), {"image": images,
        "label": [1, 0, 3, 3]}, {"image": images, "label": labels.float()}, (images, torch.arange(4), labels),
        ("id", images, ["a", "b", "c", "d"], labels), types.SimpleNamespace(x=images, y=labels),
    ):  # fmt: skip
        found = unpack_batch(batch, positions=range(4))
        assert found[0] is images
        assert found[1] is not None
        assert found[1].tolist() == labels.tolist()
    several = torch.tensor([[1, 1, 0], [0, 1, 0], [0, 0, 0], [1, 0, 0]])
    for batch in ((images, several), (images, ["cat", "dog", "cat", "dog"]), (images, torch.rand(4))):
        assert unpack_batch(batch)[1] is None


def test_the_position_of_a_sample_is_not_its_label() -> None:
    class Indexed(Images):
        def __getitem__(self, index: int) -> Any:
            return self.images[index], index, self.classes[index]

    probe = draw_probe(DataLoader(Indexed(8), 4), 4)
    assert probe.labels is not None
    assert sorted(probe.labels.tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize("says_labels", [True, False])
def test_samples_that_cannot_be_read_are_passed_over(says_labels: bool) -> None:
    class Broken(Images):
        def __getitem__(self, index: int) -> Any:
            if index in (0, 5):
                raise OSError("truncated")
            return super().__getitem__(index)

    assert len(draw_probe(DataLoader(Broken(16, says_labels=says_labels), 4), 4)) == 4


class Batches:
    """A loader of somebody's own."""

    def __init__(self) -> None:
        self.passes = 0

    def __iter__(self) -> Any:
        self.passes += 1
        return iter([(images_of(4, seed), torch.arange(4)) for seed in range(3)])


def test_loaders_of_ones_own() -> None:
    loader = Batches()
    assert len(draw_probe(loader, 10)) == 10
    assert loader.passes == 0


def test_state_of_a_data_set_that_cannot_be_copied_is_put_back() -> None:
    data = Noisy(lock=True)
    before = data.state()
    draw_probe(DataLoader(data, 4), 4)
    assert data.state() == before


def test_data_sets_whose_items_are_batches() -> None:
    whole = [(images_of(4, seed), torch.arange(4)) for seed in range(3)]
    by_sampler = DataLoader(whole, batch_size=None)
    assert len(draw_probe(by_sampler, 10)) == 10
    assert len(draw_probe(whole, 10)) == 10


def test_batches_of_several_shapes() -> None:
    images, labels = images_of(2), torch.tensor([1, 0])
    for batch in (
        (images, labels), [images, labels], {"pixel_values": images, "labels": labels},
        {"id": labels.float(), "image": images, "target": labels}, (labels.float(), images, labels),
    ):  # fmt: skip
        found = unpack_batch(batch)
        assert found[0] is images
        assert found[1] is labels
    assert unpack_batch(images)[1] is None
    assert unpack_batch((images, labels.float()))[1] is None  # not classes


def test_fingerprint_tells_images_and_labels_apart() -> None:
    images, labels = images_of(4), torch.arange(4)
    one = ProbeBatch(images, labels).fingerprint
    assert ProbeBatch(images.clone(), labels.clone()).fingerprint == one
    assert ProbeBatch(images + 1e-6, labels).fingerprint != one
    assert ProbeBatch(images, labels.flip(0)).fingerprint != one
    assert ProbeBatch(images, None).fingerprint != one


def test_masks_of_the_evidence_come_along_in_the_order_of_the_images():
    images, labels = torch.randn(12, 3, 8, 8), torch.arange(12) % 3
    masks = torch.rand(12, 8, 8) > 0.5
    probe = draw_probe(DataLoader(TensorDataset(images, labels, masks), 4), 6)
    for image, mask in zip(probe.images, probe.masks, strict=True):
        index = int((images == image).flatten(1).all(1).nonzero())
        assert torch.equal(mask, masks[index])
    without = draw_probe(DataLoader(TensorDataset(images, labels, masks.float()), 4), 6)
    assert without.masks is None
    assert without.fingerprint == probe.fingerprint
