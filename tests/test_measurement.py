"""One probe as numbers, in one process; tests/test_distributed.py has two."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch

from gmar_lightning import gmar
from gmar_lightning.monitor.attributes import attributes_kept
from gmar_lightning.monitor.measurement import Measurement, ProbeError, measure, on_every_process
from gmar_lightning.monitor.probe import ProbeBatch
from tests.helpers.tiny import images_of, vit

PROBE = ProbeBatch(images_of(5), torch.tensor([0, 1, 2, 3, 0]))


@pytest.mark.parametrize(
    ("target", "classes"), [("predicted", None), ("label", PROBE.labels), (2, torch.full((5,), 2))]
)
def test_measurement_is_the_mean_of_gmar(target: Any, classes: Any) -> None:
    torch.manual_seed(0)
    model = vit()
    found = measure(model, PROBE, target=target, micro_batch_size=2)
    alone = gmar(model, PROBE.images, classes, signals=True)
    np.testing.assert_allclose(found.importance, alone.importance.mean(0), rtol=1e-5)
    np.testing.assert_allclose(found.heatmaps, alone.heatmaps, atol=1e-6)
    np.testing.assert_allclose(found.entropy, alone.signals["entropy"].mean(0), rtol=1e-5)
    assert found.targets.tolist() == alone.targets.tolist()
    np.testing.assert_allclose(found.probabilities.sum(-1), 1, rtol=1e-6)


def of(importance: Any) -> Measurement:
    empty = np.zeros(0)
    return Measurement(empty, np.array(importance), empty, empty, empty, empty, empty)


def test_shares_of_ragged_empty_and_broken_layers() -> None:
    shares = of([[1.0, 3.0, np.nan], [0.0, 0.0, 0.0], [np.nan] * 3]).shares
    np.testing.assert_allclose(shares[0], [0.25, 0.75, np.nan])
    np.testing.assert_allclose(shares[1], [1 / 3] * 3)
    assert np.isnan(shares[2]).all()


def test_halving_goes_down_to_one_image_and_says_so() -> None:
    sizes: list[int] = []

    def explain(*args: Any, micro_batch_size: int, **settings: Any) -> Any:
        sizes.append(micro_batch_size)
        raise torch.OutOfMemoryError

    with pytest.raises(ProbeError, match="one image at a time"):
        measure(vit(), PROBE, explain)
    assert sizes == [5, 3, 2, 1]


@pytest.mark.parametrize("error", [MemoryError, RuntimeError])
def test_failure_keeps_no_activations(error: type[Exception]) -> None:
    """A traceback held too long would hold the memory that the retry needs."""
    held: list[Any] = []

    def work() -> None:
        activations = torch.zeros(10)
        held.append(weakref.ref(activations))
        raise error("out")

    gc.disable()
    try:
        with pytest.raises(error) as caught:
            on_every_process(work)
        del caught
        assert held[0]() is None or error is RuntimeError
    finally:
        gc.enable()


def test_labels_as_target_need_labels() -> None:
    with pytest.raises(ProbeError, match="needs labels"):
        measure(vit(), ProbeBatch(PROBE.images), target="label")


def test_attributes_are_put_back_after_an_error_too() -> None:
    module = torch.nn.Linear(2, 2)
    module.register_buffer("centre", torch.zeros(2))
    module.count, module.seen, module.sums = 1, [1], torch.zeros(2)
    seen, sums, centre = module.seen, module.sums, module.centre

    def misbehave() -> None:
        with attributes_kept([module]):
            module.count += 1
            module.seen.append(2)
            module.sums += 1
            module.centre = module.centre + 1
            module.new = "new"
            del module.seen
            raise KeyError

    with pytest.raises(KeyError):
        misbehave()
    assert (module.count, module.seen, hasattr(module, "new")) == (1, [1], False)
    assert module.seen is seen
    assert module.sums is sums
    assert module.sums.tolist() == [0, 0]
    assert module.centre is centre
    assert module.centre.tolist() == [0, 0]
