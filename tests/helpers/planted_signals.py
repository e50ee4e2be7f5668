"""Made-up signals of heads beside importance: a healthy model plus one planted trouble, and the truth about it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.helpers.planted import healthy

Signals = dict[str, np.ndarray]  # name -> (probes, layers, heads)

EVENTS = {
    "one token": "entropy_collapse",
    "uniform": "uniform_attention",
    "logits": "logit_growth",
    "sink": "attention_sink",
    "copy": "head_copy",
    "tokens alike": "rank_collapse",
    "constant": "constant_values",
}
CAUSES = {
    "values": "switched off by its values",
    "projection": "switched off by its output projection",
    "no-op": "no-op sink",
    "saturated": "saturated",
    "even": "uniform",
    "cancel": "images cancel",
    "nothing known": "unknown",
}
LAYER_CAUSES = {
    "no gradient": "no gradient reaches the layer",
    "LayerScale": "LayerScale at zero",
    "layer values": "switched off by its values",
}


def healthy_signals(rng: np.random.Generator, layers: int, heads: int, probes: int) -> Signals:
    """Heads as they differ: sharp ones, even ones and sinks among them, drifting a little under noise."""
    shape = (probes, layers, heads)

    def wander(low: float, high: float, size: tuple[int, ...] = (1, layers, heads)) -> np.ndarray:
        level = rng.uniform(low, high, size)
        drift = rng.normal(0, 0.01, shape).cumsum(axis=0).clip(-0.3, 0.3)
        return level * np.exp(drift + rng.normal(0, 0.03, shape))

    entropy = np.minimum(wander(0.35, 0.93), 0.995)
    odd = rng.random((layers, heads))
    entropy = np.where(odd < 0.08, wander(0.02, 0.06), np.where(odd > 0.92, 1 - wander(1e-5, 1e-4), entropy))
    mass = np.where(odd < 0.05, 1 - wander(0.02, 0.06), np.minimum(wander(0.1, 0.5), 0.7))
    return {
        "importance": healthy(rng, layers, heads, probes),
        "entropy": entropy,
        "logit_max": wander(2.0, 15.0) * np.linspace(0.5, 1.5, probes)[:, None, None],
        "sink_mass": mass,
        "sink_value_norm": wander(0.5, 1.3),
        "similarity": np.minimum(wander(0.1, 0.7), 0.95),
        "token_similarity": np.minimum(wander(0.1, 0.7, (1, layers, 1))[:, :, :1] * np.ones(shape), 0.95),
        "value_similarity": np.minimum(wander(0.05, 0.7), 0.95),
        "value_norm": wander(1.0, 5.0),
        "gradient_norm": wander(0.1, 0.5),
        "output_norm": wander(1.0, 5.0),
        "agreement": np.minimum(wander(0.3, 0.8), 1.0),
    }


def plant(
    signals: Signals, name: str, start: int, where: tuple[int, int | slice], rng: np.random.Generator
) -> None:
    """Change signals in place, from a probe on, as the trouble of that name would."""
    at = (slice(start, None), *where)

    def to(signal: str, level: float) -> None:
        signals[signal][at] = level * np.exp(rng.normal(0, 0.05, signals[signal][at].shape))

    def by(factor: float, *names: str, place: tuple = at) -> None:
        for signal in names:
            signals[signal][place] = signals[signal][place] * factor

    low = float(rng.uniform(0.005, 0.06))
    plants: dict[str, Callable[[], object]] = {
        "one token": lambda: (to("entropy", low), to("logit_max", 25.0)),
        "uniform": lambda: signals["entropy"].__setitem__(at, 1 - low * 1e-3),
        "logits": lambda: signals["logit_max"].__setitem__(at, _growing(signals["logit_max"][at])),
        "sink": lambda: (signals["sink_mass"].__setitem__(at, 1 - low), to("entropy", low)),
        "copy": lambda: signals["similarity"].__setitem__(at, 1 - low * 0.05),
        "tokens alike": lambda: signals["token_similarity"].__setitem__(at, 1 - low * 0.5),
        "constant": lambda: signals["value_similarity"].__setitem__(at, 1 - low * 0.1),
        "values": lambda: by(low, "value_norm", "output_norm", "importance"),
        "projection": lambda: by(low, "gradient_norm", "importance"),
        "no-op": lambda: (
            signals["sink_mass"].__setitem__(at, 1 - low),
            to("entropy", low),
            to("sink_value_norm", 0.05),
            by(low, "output_norm", "importance"),
        ),
        "saturated": lambda: (to("entropy", low), to("logit_max", 150.0), by(low, "importance")),
        "even": lambda: (signals["entropy"].__setitem__(at, 1 - low * 1e-3), by(low, "importance")),
        "cancel": lambda: by(low, "agreement", "importance"),
        "nothing known": lambda: by(low, "importance"),
        "no gradient": lambda: (
            by(low, "gradient_norm", "importance"),
            by(low, "gradient_norm", place=(slice(start, None), slice(0, where[0]))),
        ),
        "LayerScale": lambda: by(low, "gradient_norm", "importance"),
        "layer values": lambda: by(low, "value_norm", "output_norm", "importance"),
    }
    plants[name]()


def _growing(level: np.ndarray) -> np.ndarray:
    growth = np.minimum(1.5 ** np.arange(len(level)), 40.0)
    return level * growth.reshape(-1, *[1] * (level.ndim - 1))
