"""Made-up importance series in which it is known which heads died: healthy noise plus one planted trouble."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

FATAL = 0.1  # a planted head counts as dead from the probe at which its gate passes this


@dataclass
class Series:
    """A series ``(probes, layers, heads)`` and the truth about it.

    Attributes:
        dead: Probe from which each planted head is dead.
        expected: Events that must be raised, as ``(kind, layer, head)``.
        allowed: Kinds that may be raised besides.
    """

    name: str
    importance: np.ndarray
    dead: dict[tuple[int, int], int] = field(default_factory=dict)
    expected: set[tuple[str, int | None, int | None]] = field(default_factory=set)
    allowed: set[str] = field(default_factory=set)


def healthy(rng: np.random.Generator, layers: int, heads: int, probes: int = 80) -> np.ndarray:
    """Log-normal heads that drift slowly under probe noise; the first probe is an undecided initialisation."""
    noise = rng.uniform(0.04, 0.15)
    level = rng.normal(0.0, 1.0, (1, layers, 1)) + rng.uniform(-8, 8)
    heads_apart = rng.normal(0.0, 0.45, (1, layers, heads)).clip(-1.0, 1.2)
    drift = rng.normal(0.0, rng.uniform(0.0, 0.03), (probes, layers, heads)).cumsum(axis=0).clip(-0.5, 0.5)
    trend = rng.normal(0.0, 0.02, (probes, layers, 1)).cumsum(axis=0)
    trend = trend + np.linspace(0, rng.uniform(-0.7, 1.5), probes)[:, None, None]
    log = level + heads_apart + drift + trend + rng.normal(0.0, noise, (probes, layers, heads))
    log[0] = level[0] + rng.normal(0.0, 0.1, (layers, heads)) + rng.uniform(-2, 2)
    return np.exp(log)


def fall(probes: int, start: int, length: int, end: float) -> np.ndarray:
    """A gate of 1 that falls geometrically from ``start`` within ``length`` probes to ``end``; ``(probes,)``."""
    progress = np.clip((np.arange(probes) - start + 1) / max(length, 1), 0.0, 1.0)
    return np.maximum(end, 1e-4) ** progress * np.where((progress == 1.0) & (end == 0), 0.0, 1.0)


def _collapse(
    rng: np.random.Generator, series: np.ndarray, layer: int, some: np.ndarray, together: bool = True
) -> dict[tuple[int, int], int]:
    """Close the gates of some heads of a layer in place."""
    probes = len(series)
    dead = {}
    start, length = int(rng.integers(8, 35)), int(rng.choice([1, 5, 25]))
    end = float(rng.choice([0.0, 0.01, 0.03, 0.06]))
    for head in some:
        if not together:
            start, length = int(rng.integers(8, 35)), int(rng.choice([1, 5, 25]))
        gate = fall(probes, start, length, end)
        series[:, layer, head] *= gate
        dead[layer, int(head)] = int(np.argmax(gate <= FATAL))
    return dead


def _planted_heads(name: str, rng: np.random.Generator, layers: int, heads: int) -> Series:
    series = healthy(rng, layers, heads)
    layer, order = int(rng.integers(layers)), rng.permutation(heads)
    count = {"one head": 1, "half the heads": max(1, heads // 2), "all but one": heads - 1}[name]
    dead = _collapse(rng, series, layer, order[:count])
    return Series(name, series, dead, {("collapsed", *at) for at in dead}, {"dominance", "dominance_end"})


def _several_layers(name: str, rng: np.random.Generator, layers: int, heads: int) -> Series:
    series = healthy(rng, layers, heads)
    dead = {}
    for layer in range(layers):
        count = int(rng.integers(0, heads))
        dead |= _collapse(rng, series, layer, rng.permutation(heads)[:count], together=False)
    return Series(name, series, dead, {("collapsed", *at) for at in dead}, {"dominance", "dominance_end"})


def _healthy(name: str, rng: np.random.Generator, layers: int, heads: int) -> Series:
    return Series(name, healthy(rng, layers, heads, 120))


def _dips(name: str, rng: np.random.Generator, layers: int, heads: int) -> Series:
    series = healthy(rng, layers, heads)
    layer = int(rng.integers(layers))
    for head in rng.permutation(heads)[: int(rng.integers(1, heads))]:
        start = int(rng.integers(6, 60))
        series[start : start + int(rng.integers(1, 3)), layer, head] *= rng.choice([0.0, 0.05])
    return Series(name, series)


def _exploding(name: str, rng: np.random.Generator, layers: int, heads: int) -> Series:
    series = healthy(rng, layers, heads)
    layer, head, start = int(rng.integers(layers)), int(rng.integers(heads)), int(rng.integers(3, 50))
    stop = start + int(rng.choice([1, 2, 3, 10, 1000]))
    series[start:stop, layer, head] *= rng.choice([20.0, 100.0, 1000.0])
    return Series(name, series, allowed={"dominance", "dominance_end"})


def _vanishing(name: str, rng: np.random.Generator, layers: int, heads: int) -> Series:
    series = healthy(rng, layers, heads)
    layer, start = int(rng.integers(layers)), int(rng.integers(8, 40))
    length, end = int(rng.choice([1, 5, 25])), rng.choice([0.0, 0.01, 0.03, 0.06])
    gates = np.stack([fall(len(series), start, length, end) for _ in range(heads)], axis=-1)
    series[:, layer] *= gates
    return Series(name, series, expected={("layer_vanishing", layer, None)})


def _shrinking(name: str, rng: np.random.Generator, layers: int, heads: int) -> Series:
    series = healthy(rng, layers, heads)
    gate = fall(
        len(series), int(rng.integers(8, 40)), int(rng.choice([1, 10, 30])), rng.choice([0.001, 0.01, 0.06])
    )
    series *= gate[:, None, None]
    return Series(name, series, expected={("global_shrink", None, None)})


def _born_dead(name: str, rng: np.random.Generator, layers: int, heads: int) -> Series:
    series = healthy(rng, layers, heads)
    layer = int(rng.integers(layers))
    some = rng.permutation(heads)[: int(rng.integers(1, heads // 2 + 1))]
    series[1:, layer, some] *= rng.choice([0.0, 0.01, 0.04])
    return Series(
        name,
        series,
        expected={("dormant", layer, int(head)) for head in some},
        allowed={"dominance", "dominance_end"},
    )


def _waking(name: str, rng: np.random.Generator, layers: int, heads: int) -> Series:
    series = healthy(rng, layers, heads)
    layer, head, start = int(rng.integers(layers)), int(rng.integers(heads)), int(rng.integers(15, 50))
    gate = fall(len(series), start, int(rng.choice([1, 5, 20])), 0.02)
    series[1:, layer, head] *= 0.02 / gate[1:]
    return Series(
        name,
        series,
        expected={(kind, layer, head) for kind in ("dormant", "woke")},
        allowed={"dominance", "dominance_end"},
    )


def _recovering(name: str, rng: np.random.Generator, layers: int, heads: int) -> Series:
    series = healthy(rng, layers, heads)
    layer, start = int(rng.integers(layers)), int(rng.integers(8, 40))
    some = rng.permutation(heads)[: int(rng.integers(1, heads))]
    series[start : start + int(rng.integers(6, 25)), layer, some] *= rng.choice([0.0, 0.02, 0.05])
    expected = {(kind, layer, int(head)) for kind in ("collapsed", "recovered") for head in some}
    dead = {(layer, int(head)): start for head in some}
    return Series(name, series, dead, expected, {"dominance", "dominance_end"})


def _dominance(name: str, rng: np.random.Generator, layers: int, heads: int) -> Series:
    series = healthy(rng, layers, heads)
    layer, head, start = int(rng.integers(layers)), int(rng.integers(heads)), int(rng.integers(8, 40))
    rest = np.delete(series[:, layer], head, axis=1).sum(axis=1)
    series[start : start + 20, layer, head] = 9 * rest[start : start + 20]
    expected = {("dominance", layer, head), ("dominance_end", layer, head)}
    return Series(name, series, expected=expected)


SCENARIOS: dict[str, Callable[[str, np.random.Generator, int, int], Series]] = {
    "healthy": _healthy,
    "one head": _planted_heads,
    "half the heads": _planted_heads,
    "all but one": _planted_heads,
    "several layers": _several_layers,
    "dips": _dips,
    "exploding": _exploding,
    "layer vanishing": _vanishing,
    "global shrink": _shrinking,
    "born dead": _born_dead,
    "waking": _waking,
    "recovering": _recovering,
    "dominance": _dominance,
}


def planted(name: str, seed: int, layers: int, heads: int) -> Series:
    """The series of a scenario in `SCENARIOS`."""
    return SCENARIOS[name](name, np.random.default_rng([seed, layers, heads]), layers, heads)
