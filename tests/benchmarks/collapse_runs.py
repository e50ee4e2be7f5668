"""Small Vision Transformers trained on real digits, with heads made to die, to dip or to be born dead."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from tests.benchmarks.training import RECIPES, Hooks, Recipe, Signals, kept, learn
from tests.helpers.planted import FATAL, fall


@dataclass
class Plant:
    """Heads `(layer, head)` that are tampered with, what passes of them at each probe, and where it acts."""

    heads: list[tuple[int, int]]
    gate: np.ndarray
    place: str


@dataclass
class Run:
    """What a training run left behind: its signals, and what was planted."""

    kind: str
    recipe: str
    seed: int
    what: Plant
    signals: Signals

    @property
    def dead(self) -> dict[tuple[int, int], int]:
        """Probe from which each head that dies after having lived is dead."""
        gate = self.what.gate
        if gate[0] <= FATAL or (gate <= FATAL).sum() <= 2:
            return {}
        return dict.fromkeys(self.what.heads, int(np.argmax(gate <= FATAL)))


def plant(kind: str, seed: int, recipe: Recipe) -> Plant:
    """The plant of a kind for a seed."""
    rng = np.random.default_rng([seed, recipe.depth, recipe.heads, 7])
    probes = recipe.probes
    layer = int(rng.integers(recipe.depth))
    order = [int(head) for head in rng.permutation(recipe.heads)]
    start, end = int(rng.integers(10, probes // 2)), float(rng.choice([0.0, 0.02, 0.05]))
    length = int(rng.choice([1, 5, 20]))
    place = ("output", "value")[seed % 2]
    ones = np.ones(probes)
    window = (np.arange(probes) >= start) & (np.arange(probes) < start + 12)
    some = {"several": order[: max(2, recipe.heads // 2)], "all but one": order[:-1], "whole layer": order}
    gates: dict[str, Callable[[], np.ndarray]] = {
        "abrupt": lambda: fall(probes, start, 1, end),
        "fast": lambda: fall(probes, start, 5, max(end, 0.01)),
        "slow": lambda: fall(probes, start, 20, max(end, 0.01)),
        "several": lambda: fall(probes, start, length, max(end, 0.01)),
        "all but one": lambda: fall(probes, start, length, max(end, 0.01)),
        "whole layer": lambda: fall(probes, start, length, max(end, 0.01)),
        "partial": lambda: fall(probes, start, 1, 0.4),
        "temporary": lambda: np.where(window, end, 1.0),
        "dip": lambda: np.where(window & (np.arange(probes) < start + 1 + seed % 2), end, 1.0),
        "born dead": lambda: ones * end,
        "waking": lambda: np.where(np.arange(probes) < start, end, 1.0),
        "exploding": lambda: fall(probes, start, 1, (20.0, 100.0)[seed % 2]),
    }
    if kind not in gates:
        return Plant([], np.ones(probes), place)
    return Plant([(layer, head) for head in some.get(kind, order[:1])], gates[kind](), place)


def attach(model: VisionTransformer, gates: dict[str, Tensor], width: int) -> None:
    """Multiply each head's value or output by its gate, `(layers, heads)` for each place."""
    for index, block in enumerate(model.blocks):

        def scale(_: object, __: object, qkv: Tensor, index: int = index) -> Tensor:
            query, key, value = qkv.chunk(3, dim=-1)
            return torch.cat([query, key, value * gates["value"][index].repeat_interleave(width)], dim=-1)

        def scale_output(_: object, inputs: tuple[Tensor, ...], index: int = index) -> tuple[Tensor]:
            return (inputs[0] * gates["output"][index].repeat_interleave(width),)

        block.attn.qkv.register_forward_hook(scale)
        block.attn.proj.register_forward_pre_hook(scale_output)


def gated(what: Plant, layers: int, heads: int, width: int) -> Hooks:
    """The hooks that put a plant into a run."""
    gates = {place: torch.ones(layers, heads) for place in ("value", "output")}

    def close(probe: int, *_: object) -> None:
        for layer, head in what.heads:
            gates[what.place][layer, head] = float(what.gate[probe])

    return Hooks(attach=lambda model: attach(model, gates, width), before_probe=close)


def train(kind: str, name: str, seed: int, data: tuple[Tensor, Tensor], folder: Path | None) -> Run:
    """One run of a recipe in `RECIPES`, from initialisation, with its plant; read from `folder` if it is there."""
    recipe = RECIPES[name]
    what = plant(kind, seed, recipe)
    hooks = gated(what, recipe.depth, recipe.heads, recipe.width)
    signals = kept(folder, f"{name} {kind} {seed}", lambda: learn(recipe, seed, data, hooks))
    return Run(kind, name, seed, what, signals)
