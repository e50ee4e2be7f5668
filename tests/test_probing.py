"""One probe as numbers, in one process; tests/test_distributed.py has two."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch

from gmar_lightning import gmar
from gmar_lightning.explain.isolation import kept
from gmar_lightning.explain.sanity import rank_correlation
from gmar_lightning.metrics import HeadImportance
from gmar_lightning.monitor.collapse import CollapseDetector
from gmar_lightning.monitor.explanation import explain_together
from gmar_lightning.monitor.packing import SIGNALS
from gmar_lightning.monitor.probe import ProbeBatch
from gmar_lightning.monitor.probing import Moment, Prober
from gmar_lightning.monitor.processes import ProbeError, on_every_process
from gmar_lightning.monitor.record import ProbeRecord, shares_of
from gmar_lightning.monitor.settings import ProbeSettings
from tests.helpers.tiny import images_of, vit

PROBE = ProbeBatch(images_of(5), torch.tensor([0, 1, 2, 3, 0]))


@pytest.mark.parametrize(
    ("target", "classes"), [("predicted", None), ("label", PROBE.labels), (2, torch.full((5,), 2))]
)
def test_a_record_is_the_mean_of_gmar(target: Any, classes: Any) -> None:
    torch.manual_seed(0)
    model = vit()
    record = taken(model, ProbeSettings(target=target, micro_batch_size=2))
    alone = gmar(model, PROBE.images, classes, signals=True)
    assert record.importance is not None
    assert record.heatmaps is not None
    np.testing.assert_allclose(record.importance, alone.importance.mean(0), rtol=1e-5)
    np.testing.assert_allclose(record.heatmaps, alone.heatmaps, atol=1e-6)
    np.testing.assert_allclose(record.signals["entropy"], alone.signals["entropy"].mean(0), rtol=1e-5)
    np.testing.assert_allclose(record.signals["contribution"], alone.contribution.abs().mean(0), rtol=1e-5)
    np.testing.assert_allclose(record.signals["contribution_signed"], alone.contribution.mean(0), atol=1e-7)
    np.testing.assert_allclose(record.signals["logit_max"], alone.signals["logit_max"].amax(0), rtol=1e-5)
    assert set(record.signals) <= set(SIGNALS)
    assert set(record.maps) == {"gradient", "paper", "flow", "rollout", "last_layer"}
    assert list(record.targets) == alone.targets.tolist()
    assert list(record.predictions) == alone.logits.argmax(-1).tolist()
    expected = alone.logits.softmax(-1)
    np.testing.assert_allclose(record.probabilities, expected.amax(-1), rtol=1e-6)
    scores = alone.logits.gather(1, alone.targets[:, None])[:, 0]
    np.testing.assert_allclose(record.scores, scores, rtol=1e-6)


def taken(model: torch.nn.Module, settings: ProbeSettings, step: int = 7, **changes: Any) -> ProbeRecord:
    prober = Prober(settings, on_error="raise", **changes)
    prober.begin(PROBE, segment=3)
    return prober.take(model, Moment(step, step + 1, epoch=2, metrics={"loss": 0.5}))


def test_a_record_is_complete_when_it_leaves() -> None:
    prober = Prober(ProbeSettings(faithfulness_every=2), detector=CollapseDetector(), on_error="raise")
    prober.begin(PROBE, segment=3)
    model = vit()
    first, second = (prober.take(model, Moment(step, step + 1, 2, {"loss": 0.5})) for step in (7, 9))
    assert (first.step, first.global_step, first.epoch, first.segment) == (7, 8, 2, 3)
    assert first.metrics == {"loss": 0.5}
    assert first.seconds > 0
    assert first.drift is None
    assert second.drift is not None
    assert second.drift["rank_correlation_previous"].tolist() == pytest.approx([1.0] * 5)  # the same model
    assert first.faithfulness is not None
    assert second.faithfulness is not None
    assert np.isfinite(list(first.faithfulness.values())).all()
    assert np.isnan(list(second.faithfulness.values())).all()
    assert first.faithfulness.keys() == second.faithfulness.keys()
    both = gmar(model, PROBE.images, runner_up=True)
    assert both.heatmaps is not None
    assert both.runner_up is not None
    expected = rank_correlation(both.heatmaps, both.runner_up).mean()  # of all images, not of four
    assert first.faithfulness["class_sensitivity"] == pytest.approx(float(expected), abs=1e-3)
    assert first.layers == ("blocks.0.attn", "blocks.1.attn")


def test_a_failed_probe_is_a_record_too() -> None:
    prober = Prober(ProbeSettings(target="label"), say=None)
    prober.begin(ProbeBatch(PROBE.images))
    record = prober.take(vit(), Moment(4, 5))
    assert record.failure is not None
    assert "needs labels" in record.failure
    assert record.importance is record.shares is record.heatmaps is None
    assert (prober.taken, prober.failed) == (1, 1)


def test_weights_are_gathered_once_for_all_a_probe_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    from gmar_lightning.monitor import probing

    entered: list[int] = []
    monkeypatch.setattr(probing, "gathered", counted(probing.gathered, entered))
    taken(vit(), ProbeSettings(faithfulness_every=1), detector=CollapseDetector())
    assert len(entered) == 1


def counted(context: Any, calls: list[int]) -> Any:
    def counting(*args: Any) -> Any:
        calls.append(1)
        return context(*args)

    return counting


def test_one_definition_of_a_share() -> None:
    importance = np.array([[1.0, 3.0, np.nan], [0.0, 0.0, 0.0], [np.nan] * 3])
    shares = ProbeRecord(0, 0, signals={"importance": importance}).shares
    assert shares is not None
    np.testing.assert_allclose(shares[0], [0.25, 0.75, np.nan])
    np.testing.assert_array_equal(shares[1], [0, 0, 0])  # nothing to share
    assert np.isnan(shares[2]).all()
    metric = HeadImportance(3, 3)
    metric.update(torch.from_numpy(importance)[None])
    np.testing.assert_allclose(metric.compute()["share"], shares, rtol=1e-6)
    detector = CollapseDetector()
    for step in (0, 1):  # the first probe is no reference
        detector.update(step, importance[:2])
    states = [[state.share for state in row] for row in detector.states]
    np.testing.assert_allclose(states[0], [0.25, 0.75])
    np.testing.assert_array_equal(states[1], [0, 0, 0])
    np.testing.assert_array_equal(shares_of(np.stack([importance] * 2))[1], shares)


def test_halving_goes_down_to_one_image_and_says_so() -> None:
    sizes: list[int] = []

    def explain(*args: Any, micro_batch_size: int, **settings: Any) -> Any:
        sizes.append(micro_batch_size)
        raise torch.OutOfMemoryError

    with pytest.raises(ProbeError, match="one image at a time"):
        explain_together(vit(), PROBE, ProbeSettings(), explain)
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
        explain_together(vit(), ProbeBatch(PROBE.images), ProbeSettings(target="label"))


def test_attributes_are_put_back_after_an_error_too() -> None:
    module = torch.nn.Linear(2, 2)
    module.register_buffer("centre", torch.zeros(2))
    module.count, module.seen, module.sums = 1, [1], torch.zeros(2)
    seen, sums, centre = module.seen, module.sums, module.centre

    def misbehave() -> None:
        with kept({"module": module}):
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
