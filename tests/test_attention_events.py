"""Events for what importance cannot see, and causes: made-up signals in which the truth is known."""

import json

import numpy as np
import pytest

from gmar_lightning.monitor.attention_kinds import RULES
from gmar_lightning.monitor.collapse import CollapseDetector
from tests.helpers.planted_signals import CAUSES, EVENTS, LAYER_CAUSES, healthy_signals, plant

SHAPES = [(2, 3), (4, 6), (8, 12)]
SEEDS = range(400, 403)
KINDS = {rule.kind for rule in RULES}
# Attention on one token also grows the logits, and a sink has no entropy: neither is a false alarm.
BESIDE = {"logits": {"entropy_collapse"}}


def series_of(name, seed, layers, heads, probes=50):
    """Signals, the planted place, and the probe from which the plant acts."""
    rng = np.random.default_rng([seed, layers, heads])
    signals = healthy_signals(rng, layers, heads, probes)
    layer, head, start = int(rng.integers(layers)), int(rng.integers(heads)), int(rng.integers(15, 30))
    if name is not None:
        # the planted head is an ordinary one: what always was degenerate has nothing to lose
        signals["entropy"][:, layer, head] = np.clip(0.6 + rng.normal(0, 0.01, probes), 0, 1)
        signals["sink_mass"][:, layer, head] = 0.4
        whole = name in LAYER_CAUSES or name == "tokens alike"
        plant(signals, name, start, (layer, slice(None) if whole else head), rng)
    return signals, (layer, head), start


def feed(signals, detector=None, first=0, last=None, without=()):
    detector = detector or CollapseDetector()
    events = []
    for step in range(first, last or len(signals["importance"])):
        now = {name: values[step] for name, values in signals.items() if name not in ("importance", *without)}
        events += detector.update(step, signals["importance"][step], signals=now)
    return events


@pytest.mark.parametrize(("layers", "heads"), SHAPES)
def test_healthy_signals_are_silent(layers, heads):
    for seed in SEEDS:
        signals, _, _ = series_of(None, seed, layers, heads, 80)
        assert [e for e in feed(signals) if "dominance" not in e.kind] == [], seed


@pytest.mark.parametrize("name", EVENTS)
@pytest.mark.parametrize(("layers", "heads"), SHAPES)
def test_each_trouble_is_named_where_it_is(name, layers, heads):
    for seed in SEEDS:
        signals, (layer, head), start = series_of(name, seed, layers, heads)
        events = [e for e in feed(signals) if e.kind in KINDS and e.kind not in BESIDE.get(name, ())]
        where = None if name == "tokens alike" else head
        assert [(e.kind, e.layer, e.head) for e in events] == [(EVENTS[name], layer, where)], (seed, events)
        assert events[0].step - start <= (14 if name == "logits" else 2)
        assert f"layer {layer}" in events[0].message
        assert f"since step {events[0].since_step}" in events[0].message


@pytest.mark.parametrize("name", EVENTS)
def test_two_probes_are_not_enough_and_recovery_is_said(name):
    signals, _, start = series_of(name, 500, 4, 6, 60)
    whole = {signal: values.copy() for signal, values in signals.items()}
    for signal in signals:
        whole[signal][start + 2 :] = signals[signal][start - 2 : start - 1]
    assert [e for e in feed(whole) if e.kind in KINDS] == []
    for signal in signals:
        signals[signal][start + 20 :] = signals[signal][start - 2 : start - 1]
    ends = {rule.kind: rule.end for rule in RULES}
    kinds = [e.kind for e in feed(signals) if e.kind == EVENTS[name] or e.kind == ends[EVENTS[name]]]
    assert kinds == [EVENTS[name], ends[EVENTS[name]]]


def test_alike_tokens_are_named_where_they_begin():
    """After it they are handed on, before it the model reacts; found again where they begin anew."""
    heads = np.ones(4)
    kept = {  # what the layers keep of what tells tokens apart, from one probe on
        10: (1.0, 0.9, 0.8, 0.05),  # the last layer is the first to pass the limit of its noise ...
        11: (1.0, 0.9, 1e-3, 1e-4),  # ... of what begins one layer before
        15: (1.0, 0.15, 1e-3, 1e-4),  # the layer before that one drifts along
        20: (1.0, 1.0, 1.0, 1e-4),
    }
    detector, events = CollapseDetector(), []
    for probe in range(30):
        level = next((kept[start] for start in sorted(kept, reverse=True) if start <= probe), (1.0,) * 4)
        alike = 1 - 0.6 * np.array(level)[:, None] * heads
        events += detector.update(probe, np.ones((4, 4)), signals={"token_similarity": alike})
    assert [(e.kind, e.layer, e.step) for e in events] == [
        ("rank_collapse", 2, 13),
        ("rank_restored", 2, 22),
        ("rank_collapse", 3, 22),
    ]


def test_always_degenerate_heads_are_nobodys_business():
    """A positional head can be sharp, an averaging head even, a register head a sink, from the start."""
    signals, _, _ = series_of(None, 7, 4, 6, 60)
    for head, (signal, level) in enumerate(
        [
            ("entropy", 0.01),
            ("entropy", 0.99999),
            ("sink_mass", 0.99),
            ("similarity", 0.999),
            ("value_similarity", 0.999),
        ]
    ):
        signals[signal][:, 1, head] = level
    signals["logit_max"][:, 1, 5] = 90.0
    assert [e for e in feed(signals) if e.kind in KINDS] == []


def test_a_whole_layer_that_degenerates_does_not_hide_itself():
    signals, _, _ = series_of(None, 8, 4, 6, 60)
    signals["entropy"][:, 2] = 0.6
    signals["entropy"][30:, 2] = 0.01
    found = {(e.kind, e.layer, e.head) for e in feed(signals) if e.kind in KINDS}
    assert found == {("entropy_collapse", 2, head) for head in range(6)}


@pytest.mark.parametrize("name", EVENTS)
def test_missing_signals_only_disable_their_rules(name):
    signals, _, _ = series_of(name, 9, 4, 6)
    needed = {rule.kind: rule.signal for rule in RULES}[EVENTS[name]]
    found = {e.kind for e in feed(signals, without=(needed,)) if e.kind in KINDS}
    assert EVENTS[name] not in found
    signals[needed][:] = np.nan
    assert EVENTS[name] not in {e.kind for e in feed(signals)}


def test_importance_is_judged_the_same_with_and_without_signals():
    for name in ("values", "projection", None):
        signals, _, _ = series_of(name, 11, 4, 6)
        alone = CollapseDetector()
        bare = [e for step, raw in enumerate(signals["importance"]) for e in alone.update(step, raw)]
        beside = [e for e in feed(signals) if e.kind not in KINDS]
        assert [(e.kind, e.layer, e.head, e.step) for e in bare] == [
            (e.kind, e.layer, e.head, e.step) for e in beside
        ]
        assert all(e.cause is None and e.evidence == "" for e in bare)


@pytest.mark.parametrize("cut", [3, 17, 24, 40])
def test_resumed_rules_go_on_as_if_never_stopped(cut):
    signals, _, _ = series_of("sink", 12, 4, 6)
    whole = feed(signals)
    first = CollapseDetector()
    start = feed(signals, first, last=cut)
    second = CollapseDetector()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert start + feed(signals, second, first=cut) == whole
    assert "attention_sink" in {e.kind for e in whole}


def test_state_from_before_there_were_signals_loads():
    signals, _, _ = series_of("values", 13, 4, 6)
    first = CollapseDetector()
    events = [e for step in range(12) for e in first.update(step, signals["importance"][step])]
    state = json.loads(json.dumps(first.state_dict()))
    del state["rules"]
    second = CollapseDetector()
    second.load_state_dict(state)
    events += feed(signals, second, first=12)
    assert "collapsed" in {e.kind for e in events}


def test_signal_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="entropy"):
        CollapseDetector().update(0, np.ones((2, 3)), signals={"entropy": np.ones((2, 4))})


@pytest.mark.parametrize("name", CAUSES)
def test_cause_of_a_collapse(name):
    right, asked = 0, 0
    for layers, heads in SHAPES:
        for seed in SEEDS:
            signals, at, _ = series_of(name, seed, layers, heads)
            (event,) = (e for e in feed(signals) if e.kind == "collapsed")
            assert (event.layer, event.head) == at
            asked += 1
            right += event.cause == CAUSES[name]
            if event.cause != "unknown":
                assert event.evidence in event.message
                assert sum(c.isdigit() for c in event.evidence) >= 2
    assert right >= 0.95 * asked


@pytest.mark.parametrize("name", LAYER_CAUSES)
def test_cause_of_a_vanishing_layer(name):
    right, asked = 0, 0
    for layers, heads in SHAPES[1:]:
        for seed in SEEDS:
            signals, (layer, _), _ = series_of(name, seed, layers, heads)
            if name == "no gradient" and layer in (0, layers - 1):
                # With no layer before it, that looks as LayerScale at zero; after the last, the model is starved.
                continue
            events = [e for e in feed(signals) if e.kind == "layer_vanishing" and e.layer == layer]
            asked += 1
            right += len(events) == 1 and events[0].cause == LAYER_CAUSES[name]
    assert right >= 0.95 * asked > 2


@pytest.mark.parametrize(
    ("context", "fallen", "cause"),
    [
        ({"probability": 0.99, "learning_rate": 1e-3}, "gradient_norm", "the model became confident"),
        ({"probability": 0.6, "learning_rate": 1e-5}, "gradient_norm", "the learning rate decayed"),
        ({"probability": 0.5, "learning_rate": 1e-3}, "value_norm", "the layer died"),
        ({"probability": 0.5, "learning_rate": 1e-3}, "gradient_norm", "unknown"),
    ],
)
def test_cause_of_a_shrinking_model(context, fallen, cause):
    signals, _, _ = series_of(None, 14, 4, 6)
    for signal in ("importance", fallen):
        signals[signal][20:] *= 0.02
    detector, events = CollapseDetector(), []
    for step, raw in enumerate(signals["importance"]):
        now = {name: values[step] for name, values in signals.items()}
        around = context if step >= 20 else {"probability": 0.5, "learning_rate": 1e-3}
        events += detector.update(step, raw, signals=now, context=around)
    (event,) = (e for e in events if e.kind == "global_shrink")
    assert event.cause == cause
