import numpy as np
import pytest

from gmar_lightning.monitor.record import ProbeRecord, effective_heads
from gmar_lightning.show.dashboard import as_metrics, captions, scalars
from tests.helpers.synthetic_history import collapse_event

NAN = float("nan")


def record(importance=((3.0, 1.0), (2.0, NAN)), entropy=((0.5, 0.7), (0.9, NAN)), **changes) -> ProbeRecord:
    base = {
        "step": 9,
        "global_step": 10,
        "seconds": 0.5,
        "signals": {"importance": np.array(importance), "entropy": np.array(entropy)},
        "events": (collapse_event(9, 0, 1), collapse_event(9, 0, 0, "dominance")),
        "flagged": ((0, 1),),
        "predictions": (1, 0),
        "probabilities": (0.9, NAN),
    }
    return ProbeRecord(**{**base, **changes})


def test_numbers_of_a_ragged_model_by_hand():
    found = scalars(record(), heads=[2, 1])
    expected = np.exp(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25)))
    assert found["gmar_layers/effective_heads_L00"] == pytest.approx(expected)
    assert found["gmar_layers/effective_heads_L01"] == 1
    assert found["gmar/effective_heads"] == pytest.approx((expected + 1) / 2)
    assert found["gmar/importance_min"] == 0.5  # a quarter in a layer of two heads
    assert found["gmar_layers/importance_L00"] == 4
    assert found["gmar/attention_entropy"] == pytest.approx(0.7)
    assert (found["gmar/collapsed_heads"], found["gmar/newly_collapsed"]) == (1, 1)
    assert np.isnan(found["gmar/heatmap_drift"])


def test_names_do_not_depend_on_what_was_found():
    drift = {
        "rank_correlation_previous": np.array([0.5, NAN]),
        "rank_correlation_first": np.array([1.0, 1.0]),
    }
    with_drift = scalars(record(drift=drift), heads=[2, 1])
    assert with_drift.keys() == scalars(record(), heads=[2, 1]).keys()
    assert with_drift["gmar/heatmap_drift"] == 0.5


def test_nothing_measured_is_nan_not_zero():
    table = np.full((2, 2), NAN)
    found = scalars(record(importance=table, entropy=table), heads=[2, 2])
    assert np.isnan(found["gmar/effective_heads"])
    assert np.isnan(found["gmar/importance_min"])


def test_metrics_for_other_callbacks_are_finite_tensors():
    found = as_metrics(record())
    assert found["gmar/collapsed_heads"] == 1
    assert all(value.isfinite() for value in found.values())


def test_equal_shares_are_all_the_heads():
    assert effective_heads(np.full((1, 6), 1 / 6)) == pytest.approx(6)


def test_a_layer_without_gradient_uses_no_head_and_shares_nothing():
    found = scalars(record(importance=[[3.0, 1.0], [0.0, 0.0]]), heads=[2, 2])
    assert found["gmar_layers/effective_heads_L01"] == 0
    assert found["gmar/importance_min"] == 0


def test_captions_with_and_without_labels_and_names():
    assert captions(record(), [0, 5], ["Bär", "猫"]) == [
        "#0 Bär → 猫 p=0.90 · step 9",
        "#1 5 → Bär · step 9",
    ]
    assert captions(record(scores=(2.0, 1.5)), None, None)[1] == "#1 0 score=1.5 · step 9"
    assert captions(record(), None, None)[0] == "#0 1 p=0.90 · step 9"
