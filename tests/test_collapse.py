"""The collapse detector: planted series it must name rightly, and every kind of bad input."""

import json
import math

import numpy as np
import pytest
import torch

from gmar_lightning.monitor.collapse import CollapseDetector
from gmar_lightning.monitor.events import HeadEvent
from tests.helpers.planted import SCENARIOS, Series, fall, healthy, planted

SIZES = [(1, 4), (2, 3), (4, 6), (3, 16), (12, 12)]
SEEDS = range(9000, 9003)


def feed(series, detector=None, first=0):
    """All events, with the number of the probe that raised them as their step."""
    detector = detector or CollapseDetector()
    return [event for step, probe in enumerate(series, first) for event in detector.update(step, probe)]


def names(events):
    return {(event.kind, event.layer, event.head) for event in events}


def steady(layers=3, heads=6, probes=40, seed=0):
    """A quiet model: every head near a fair share, 5 % noise."""
    return np.random.default_rng(seed).lognormal(0.0, 0.05, (probes, layers, heads))


def judged(series: Series):
    found = names(feed(series.importance))
    return found, {event for event in found - series.expected if event[0] not in series.allowed}


@pytest.mark.parametrize("scenario", [name for name in SCENARIOS if name not in ("dominance", "waking")])
def test_planted_series_are_named_rightly(scenario):
    missed, wrong, expected = [], [], 0
    for layers, heads in SIZES:
        if scenario == "layer vanishing" and layers == 1:
            continue  # with nothing to compare, one layer is the model
        for seed in SEEDS:
            series = planted(scenario, seed, layers, heads)
            found, extra = judged(series)
            expected += len(series.expected)
            missed += [(seed, layers, heads, event) for event in series.expected - found]
            # three heads, one of them twice as strong as the others together: dominance without a plant
            wrong += [(seed, layers, heads, event) for event in extra if "dominance" not in event[0]]
    assert len(missed) <= 0.03 * expected, missed
    assert len(wrong) <= (3 if scenario == "exploding" else 0), wrong


@pytest.mark.parametrize("scenario", ["one head", "half the heads", "all but one", "several layers"])
def test_planted_collapses_are_found_soon(scenario):
    delays = []
    for layers, heads in SIZES[1:]:
        for seed in SEEDS:
            series = planted(scenario, seed, layers, heads)
            at = {(e.layer, e.head): e.step for e in feed(series.importance) if e.kind == "collapsed"}
            delays += [at.get(head, math.inf) - dead for head, dead in series.dead.items()]
    assert np.percentile(delays, 50) <= 2
    assert np.percentile(delays, 90) <= 4


def test_collapse_takes_three_probes_and_says_so():
    series = steady()
    series[20:, 1, 2] *= 0.02
    (event,) = feed(series)
    assert (event.kind, event.layer, event.head, event.step, event.since_step) == ("collapsed", 1, 2, 22, 20)
    assert event.value == pytest.approx(series[22, 1, 2] / series[22, 1].sum())
    assert event.reference == pytest.approx(1 / 6, rel=0.15)
    assert "layer 1 head 2" in event.message
    assert "since step 20" in event.message
    assert "17 %" in event.message or "18 %" in event.message


@pytest.mark.parametrize("patience", [1, 2, 5])
def test_patience_counts_probes(patience):
    series = steady()
    series[20:, 0, 0] = 0.0
    (event,) = feed(series, CollapseDetector(patience=patience))
    assert event.step == 20 + patience - 1


@pytest.mark.parametrize(("length", "flagged"), [(1, False), (2, False), (3, True)])
def test_dips_shorter_than_patience_are_silent(length, flagged):
    series = steady()
    series[20 : 20 + length, 0, 0] *= 0.01
    assert (("collapsed", 0, 0) in names(feed(series))) == flagged


def test_head_recovers_and_collapses_again():
    series = steady(probes=70)
    series[20:30, 0, 4] *= 0.02
    series[50:, 0, 4] *= 0.02
    detector = CollapseDetector()
    events = feed(series, detector)
    assert [(event.kind, event.step) for event in events] == [
        ("collapsed", 22),
        ("recovered", 32),
        ("collapsed", 52),
    ]
    assert detector.flagged == [(0, 4)]


def test_half_way_back_is_not_recovered():
    series = steady(probes=60)
    series[20:40, 0, 4] *= 0.02
    series[40:, 0, 4] *= 0.2
    assert [event.kind for event in feed(series)] == ["collapsed"]


def test_all_but_one_are_blamed_and_the_survivor_is_not():
    series = steady(heads=16)
    series[20:, 2, 1:] *= 0.05
    found = names(feed(series))
    assert {("collapsed", 2, head) for head in range(1, 16)} == {e for e in found if e[0] != "dominance"}


def test_born_dead_head_is_reported_once_and_wakes():
    series = steady(probes=60)
    series[1:30, 0, 3] *= 0.01
    assert [(event.kind, event.head, event.step) for event in feed(series)] == [
        ("dormant", 3, 9),
        ("woke", 3, 32),
    ]


def test_exploding_neighbour_blames_nobody():
    series = steady()
    series[20:, 1, 2] *= 100
    assert names(feed(series)) == {("dominance", 1, 2)}


def test_explosion_that_shrinks_everything_else_blames_nobody():
    """A head so loud that normalisation turns down all others, here and in other layers."""
    series = steady()
    series[20:] *= 0.05
    series[20:, 1, 2] *= 20 * 50
    assert names(feed(series)) == {("dominance", 1, 2)}


def test_end_of_an_explosion_is_no_collapse():
    series = steady(probes=60)
    series[20:35, 1, 2] *= 100
    assert names(feed(series)) == {("dominance", 1, 2), ("dominance_end", 1, 2)}


def test_vanishing_layer_is_called_by_its_name_and_restored():
    series = steady(probes=60)
    series[20:40, 1] *= 0.02
    events = feed(series)
    assert [(e.kind, e.layer, e.head, e.step) for e in events] == [
        ("layer_vanishing", 1, None, 22),
        ("layer_restored", 1, None, 42),
    ]
    assert "layer 1" in events[0].message


def test_layer_of_one_head_vanishes_as_a_layer():
    series = steady(heads=1)
    series[20:, 1] *= 0.02
    assert names(feed(series)) == {("layer_vanishing", 1, None)}


@pytest.mark.parametrize("layers", [1, 2, 12])
def test_global_shrink_blames_nobody(layers):
    series = steady(layers=layers, probes=90) * fall(90, 20, 20, 0.01)[:, None, None]
    series[60:] *= 100
    assert [event.kind for event in feed(series)] == ["global_shrink", "global_restored"]


def test_collapse_is_found_in_a_shrinking_model():
    series = steady(probes=80) * fall(80, 20, 40, 0.05)[:, None, None]
    series[40:, 0, 1] *= 0.02
    assert ("collapsed", 0, 1) in names(feed(series))


def test_collapsed_head_is_not_revived_by_the_end_of_its_layer():
    series = steady(probes=80)
    series[20:, 1, 0] *= 0.05
    series[40:, 1, 1:] *= 0.05
    assert names(feed(series)) == {("collapsed", 1, 0), ("layer_vanishing", 1, None)}


def test_scale_of_the_gradient_does_not_matter():
    for scenario in ("several layers", "born dead", "layer vanishing"):
        series = planted(scenario, 9100, 4, 6).importance
        assert names(feed(series)) == names(feed(series * 1e-12)) == names(feed(series * 1e12))


def test_nonfinite_leaves_the_state_untouched():
    detector = CollapseDetector()
    series = steady()
    feed(series[:20], detector)
    before = json.dumps(detector.state_dict())
    for value in (math.nan, math.inf):
        probe = series[20].copy()
        probe[1, 2] = value
        (event,) = detector.update(20, probe)
        assert (event.kind, event.layer, event.head, event.step) == ("nonfinite", 1, 2, 20)
        assert json.dumps(detector.state_dict()) == before
    (event,) = detector.update(20, np.full((3, 6), math.nan))
    assert (event.kind, event.layer, event.head) == ("nonfinite", None, None)
    assert detector.update(21, series[21]) == []


def test_nonfinite_first_probe_is_not_padding():
    probe = steady()[0]
    probe[1, 2] = math.nan
    (event,) = CollapseDetector().update(0, probe)
    assert (event.layer, event.head) == (1, 2)
    probe[1] = math.nan
    (event,) = CollapseDetector().update(0, probe)
    assert (event.layer, event.head) == (1, None)


def test_ragged_layers_are_judged_as_if_alone():
    series = steady(probes=50)
    series[20:, 0, :2] *= 0.03
    series[30:, 1, 3] *= 0.03
    padded = np.full((50, 3, 9), np.nan)
    padded[:, :, :6] = series
    padded[:, 2, 4:] = np.nan
    detector = CollapseDetector()
    assert names(feed(padded, detector)) == {("collapsed", 0, 0), ("collapsed", 0, 1), ("collapsed", 1, 3)}
    assert [len(layer) for layer in detector.states] == [6, 6, 4]
    padded[-1, 2, 3] = np.nan
    (event,) = detector.update(50, padded[-1])
    assert (event.kind, event.layer, event.head) == ("nonfinite", 2, 3)


def test_all_zero_layer_is_named_once_and_no_head_is_blamed():
    series = steady()
    series[:, 1] = 0.0
    (event,) = feed(series)
    assert (event.kind, event.layer, event.head) == ("layer_vanishing", 1, None)
    assert "zero" in event.message
    series = steady()
    series[20:, 1] = 0.0
    assert names(feed(series)) == {("layer_vanishing", 1, None)}


def test_all_zero_model_is_nobodys_fault():
    assert names(feed(np.zeros((40, 3, 6)))) == {("global_shrink", None, None)}


@pytest.mark.parametrize("shape", [(3,), (0, 3), (3, 0), (2, 3, 4)])
def test_wrong_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"\(layers, heads\)"):
        CollapseDetector().update(0, np.ones(shape))


def test_changing_shape_is_refused_and_the_detector_lives_on():
    detector = CollapseDetector()
    series = steady()
    feed(series[:5], detector)
    with pytest.raises(ValueError, match=r"from \(3, 6\) to \(3, 7\)"):
        detector.update(5, np.ones((3, 7)))
    assert detector.update(5, series[5]) == []


def test_negative_importance_and_wrong_names_are_refused():
    with pytest.raises(ValueError, match="negative"):
        CollapseDetector().update(0, -np.ones((2, 3)))
    with pytest.raises(ValueError, match="3 layer names"):
        CollapseDetector().update(0, np.ones((2, 3)), ["a", "b", "c"])


def test_second_probe_of_one_step_counts_once():
    series = steady()
    series[20:, 0, 0] *= 0.01
    detector = CollapseDetector()
    feed(series[:21], detector)
    before = detector.state_dict()
    for _ in range(5):
        assert detector.update(20, series[20]) == []
    assert detector.state_dict() == before
    assert [event.step for event in feed(series[21:], detector, 21)] == [22]


def test_going_back_restarts_the_count_and_keeps_the_flags():
    series = steady(probes=60)
    series[10:, 1, 1] *= 0.01
    series[28:, 0, 0] *= 0.01
    detector = CollapseDetector()
    feed(series[:30], detector)
    assert detector.flagged == [(1, 1)]
    events = feed(series[30:], detector, 25)
    assert [(event.layer, event.head, event.step, event.since_step) for event in events] == [(0, 0, 27, 25)]


@pytest.mark.parametrize("cut", [1, 4, 12, 21, 23, 40])
def test_resumed_detector_goes_on_as_if_never_stopped(cut):
    series = planted("several layers", 9200, 4, 6).importance
    series[1:30, 0, 0] *= 0.01
    whole = feed(series)
    first = CollapseDetector()
    start = feed(series[:cut], first)
    second = CollapseDetector()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert start + feed(series[cut:], second, cut) == whole
    assert second.states


def test_unused_state_loads():
    detector = CollapseDetector()
    detector.load_state_dict(CollapseDetector().state_dict())
    assert detector.states == []
    assert detector.update(0, np.ones((2, 3))) == []


@pytest.mark.parametrize("broken", ["missing", "shape", "none"])
def test_foreign_state_is_refused_whole(broken):
    detector = CollapseDetector()
    feed(steady()[:10], detector)
    before = detector.state_dict()
    state = json.loads(json.dumps(before))
    if broken == "missing":
        del state["raw"]
    elif broken == "shape":
        state["vanished"]["run"] = [0]
    else:
        state = None
    with pytest.raises(ValueError, match="not a state"):
        detector.load_state_dict(state)
    assert detector.state_dict() == before


def test_states_tell_where_each_head_stands():
    series = steady()
    series[1:, 0, 5] *= 0.01
    series[20:, 1, 2] *= 0.02
    detector = CollapseDetector()
    assert detector.states == []
    feed(series[:3], detector)
    assert {state.status for layer in detector.states for state in layer} == {"warming"}
    feed(series[3:], detector, 3)
    states = detector.states
    assert (states[0][5].status, states[1][2].status, states[2][0].status) == (
        "dormant",
        "collapsed",
        "alive",
    )
    assert states[1][2].since_step == 20
    assert states[1][2].kept == pytest.approx(0.02, rel=0.3)
    assert sum(state.share for state in states[1]) == pytest.approx(1.0)


def test_torch_and_numpy_are_judged_alike_and_names_are_used():
    series = planted("several layers", 9300, 2, 4).importance
    layers = ["blocks.0.attn", "blocks.1.attn"]
    by_numpy, by_torch = CollapseDetector(), CollapseDetector()
    for step, probe in enumerate(series):
        tensor = torch.tensor(probe, requires_grad=True)
        events = by_torch.update(step, tensor, layers)
        assert events == by_numpy.update(step, probe, layers)
        assert all(event.layer_name == layers[event.layer] for event in events)
    assert by_torch.update(1000, torch.ones(2, 4, dtype=torch.bfloat16)) == []


def test_input_is_not_written_to():
    probe = np.full((2, 3), np.nan)
    probe[:, :2] = 1.0
    kept = probe.copy()
    CollapseDetector().update(0, probe)
    np.testing.assert_array_equal(probe, kept)


def test_healthy_training_with_a_growing_gradient_is_silent():
    series = healthy(np.random.default_rng(7), 6, 8, 300) * np.geomspace(1, 1000, 300)[:, None, None]
    assert feed(series) == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"floor": 0.0},
        {"drop": 1.0},
        {"overshadowed": 2},
        {"shrunk": 0},
        {"patience": 0},
        {"clear_after": 0},
        {"hysteresis": 0.5},
        {"warmup": 3},
    ],
)
def test_wrong_arguments_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        CollapseDetector(**wrong)


def test_messages_are_one_sentence_each():
    seen: dict[str, HeadEvent] = {}
    for scenario in SCENARIOS:
        for seed in range(3):
            seen |= {event.kind: event for event in feed(planted(scenario, seed, 4, 6).importance)}
    assert {"collapsed", "recovered", "dormant", "woke", "dominance", "dominance_end"} <= seen.keys()
    assert {"layer_vanishing", "global_shrink"} <= seen.keys()
    for event in seen.values():
        assert event.message.endswith(".")
        assert ". " not in event.message
        assert any(character.isdigit() for character in event.message)


def test_collapse_is_found_after_gradients_grew_fast():
    """Every head outgrows its own early level; none of that is an explosion."""
    series = steady() * np.minimum(1.6 ** np.arange(40), 1e4)[:, None, None]
    series[25:, 1, 2] *= 0.03
    assert names(feed(series)) == {("collapsed", 1, 2)}


def test_small_head_that_exploded_for_a_while_is_back_not_dead():
    series = steady(probes=60)
    series[:, 1, 2] *= 0.25
    series[20:35, 1, 2] *= 400
    assert {kind for kind, *_ in names(feed(series))} == {"dominance", "dominance_end"}
