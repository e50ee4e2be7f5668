"""Small Vision Transformers trained on real digits, with attention made to fail in ways importance cannot see."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from tests.benchmarks.training import Hooks, Recipe, Signals, kept, learn

ATTENTION = ("one token", "uniform", "logits", "sink", "copy", "rank", "constant")
CAUSES = ("values", "projection", "layer scale", "cut", "all values")
LOOKALIKES = ("healthy", "dip", "sharp from birth", "slow sharpening")
SHAPES = ((4, 6, 8, 8), (2, 3, 12, 8), (6, 4, 8, 4), (4, 12, 4, 8), (3, 16, 4, 8), (12, 3, 8, 8))


def recipe_of(seed: int) -> Recipe:
    """Depth, heads, head width and patch size of a seed, in turn."""
    return Recipe(*SHAPES[seed % len(SHAPES)])


@dataclass
class Series:
    """Signals of one run, each `(probes, layers, heads)`, and what was planted when.

    Attributes:
        planted: Heads tampered with, `(layer, head)`; every head of the layer for plants in a layer.
        start: Probe from which the plant acts fully.
    """

    kind: str
    seed: int
    planted: list[tuple[int, int]]
    start: int
    signals: Signals


@dataclass
class Plant:
    """What is done: to which head (and its model, for a copy), how strongly at each probe."""

    kind: str
    layer: int
    head: int
    other: int
    strength: np.ndarray
    now: int = 0
    direction: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def level(self) -> float:
        return float(self.strength[self.now])


def plant(kind: str, seed: int, probes: int) -> Plant:
    """Where and how strongly, for a seed; strength 0 leaves the model alone, 1 is the full plant."""
    rng = np.random.default_rng([seed, 11])
    recipe = recipe_of(seed)
    depth, heads, width = recipe.depth, recipe.heads, recipe.width
    layer = int(rng.integers(depth))
    head, other = (int(h) for h in rng.permutation(heads)[:2])
    start = int(rng.integers(14, probes // 2))
    length = int(rng.choice([1, 4, 10]))
    strength = np.clip((np.arange(probes) - start + 1) / length, 0, 1)
    if kind == "dip":
        strength = ((np.arange(probes) >= start) & (np.arange(probes) < start + 1 + seed % 2)).astype(float)
    if kind == "sharp from birth":
        strength = np.ones(probes)
    if kind == "slow sharpening":
        strength = np.clip((np.arange(probes) - 8) / (probes - 8), 0, 1)
    if kind in ("rank", "cut") and depth > 1:
        layer = max(layer, 1)
    direction = F.normalize(torch.randn(width, generator=torch.Generator().manual_seed(seed)), dim=0)
    return Plant(kind, layer, head, other, strength, direction=direction)


def _tampered(qkv: Tensor, what: Plant, width: int, heads: int) -> Tensor:
    """Queries, keys and values of the planted layer, `(batch, tokens, 3 * dim)`."""
    q, k, v = qkv.unflatten(-1, (3, heads, width)).unbind(2)
    level = what.level
    keep = torch.arange(heads) == what.head
    here = keep[:, None].to(qkv.dtype)
    queries = {
        "one token": 10 ** (3.0 * level) - 1,
        "dip": 10 ** (3.0 * level) - 1,
        "sharp from birth": 20.0,
        "slow sharpening": 1.5 * level,
        "logits": 10 ** (2.2 * level) - 1,
        "uniform": -level,
    }
    values = {"values": here * level, "all values": torch.full_like(here, level)}
    q = q * (1 + here * queries.get(what.kind, 0.0))
    v = v * (1 - values.get(what.kind, torch.zeros_like(here)))
    if what.kind in ("sink", "no-op sink") and level > 0:
        # a direction of its own carries the pull of the first token, and nothing else
        first = torch.zeros(q.shape[1]).index_fill(0, torch.tensor(0), 1.0)[:, None, None]
        push = here * what.direction * (6.0 * width**0.25 * level)
        k = k - (k @ what.direction)[..., None] * what.direction * here
        q, k = q + push, k + push * first
        if what.kind == "no-op sink":
            v = v * (1 - level * here * first)
    if what.kind == "copy":
        q, k, v = (
            torch.where(keep[:, None], torch.lerp(x, x[:, :, [what.other]].expand_as(x), level), x)
            for x in (q, k, v)
        )
    if what.kind == "constant":
        # one vector for every token, of the size that values have; a mean over tokens would mix them
        same = what.direction * v.detach().norm(dim=-1).mean()
        v = torch.where(keep[:, None], torch.lerp(v, same.expand_as(v), level), v)
    return torch.stack([q, k, v], 2).flatten(2)


def attach(model: VisionTransformer, what: Plant, recipe: Recipe) -> None:
    """Put the plant into the model."""
    heads, width = recipe.heads, recipe.width
    block = model.blocks[what.layer]
    block.attn.qkv.register_forward_hook(lambda _, __, qkv: _tampered(qkv, what, width, heads))
    if what.kind == "rank":

        def alike(_: object, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
            # towards one vector of the tokens' own size, each token by itself: nothing is mixed
            x = inputs[0]
            # of alternating sign: layer normalisation would take a constant vector away again
            signs = 1 - 2 * (torch.arange(x.shape[-1]) % 2)
            towards = (signs * x.detach().square().mean().sqrt())[None, None]
            return (torch.lerp(x, towards.expand_as(x), 0.995 * what.level),)

        block.register_forward_pre_hook(alike)
    if what.kind == "projection":

        def gate(_: object, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
            passed = torch.ones(heads).index_fill(0, torch.tensor(what.head), 1 - what.level)
            return (inputs[0] * passed.repeat_interleave(width),)

        block.attn.proj.register_forward_pre_hook(gate)
    if what.kind == "layer scale":
        block.attn.register_forward_hook(lambda _, __, out: out * (1 - what.level))
    if what.kind == "cut":

        def cut(_: object, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
            x = inputs[0]
            return (x.detach() * what.level + x * (1 - what.level),)

        # everything up to and including the planted layer's attention loses its gradient
        block.mlp.register_forward_pre_hook(cut)
        model.blocks[what.layer].register_forward_hook(
            lambda _, __, out: out.detach() * what.level + out * (1 - what.level)
        )


def run(kind: str, seed: int, probes: int, data: tuple[Tensor, Tensor], folder: Path | None = None) -> Series:
    """One run from initialisation; read from `folder` where it was run before."""
    recipe = recipe_of(seed)
    what = plant(kind, seed, probes)
    layerwise = kind in ("rank", "layer scale", "cut", "all values")
    heads = range(recipe.heads) if layerwise else [what.head]
    planted = [(what.layer, head) for head in heads]
    planted += [(what.layer, what.other)] if kind == "copy" else []

    def to_its_level(probe: int, *_: object) -> None:
        what.now = probe

    hooks = Hooks(attach=lambda model: attach(model, what, recipe), before_probe=to_its_level)
    signals = kept(folder, f"{kind} {seed} {probes}", lambda: learn(recipe, seed, data, hooks, probes))
    return Series(
        kind, seed, [] if kind in LOOKALIKES else planted, int(np.argmax(what.strength >= 1)), signals
    )
