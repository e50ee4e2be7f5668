"""Small Vision Transformers trained on real digits, with attention made to fail in ways importance cannot see."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from gmar_lightning.explain.gmar import gmar
from tests.benchmarks.collapse_runs import EVERY, SHAPES, build

ATTENTION = ("one token", "uniform", "logits", "sink", "copy", "rank", "constant")
CAUSES = ("values", "projection", "layer scale", "cut", "all values")
LOOKALIKES = ("healthy", "dip", "sharp from birth", "slow sharpening")


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
    signals: dict[str, np.ndarray] = field(default_factory=dict)
    accuracy: float = 0.0


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
    depth, heads, width = SHAPES[seed % len(SHAPES)][:3]
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
    if what.kind == "sink" and level > 0:
        # a direction of its own carries the pull of the first token, and nothing else
        first = torch.zeros(q.shape[1]).index_fill(0, torch.tensor(0), 1.0)[:, None, None]
        push = here * what.direction * (6.0 * width**0.25 * level)
        k = k - (k @ what.direction)[..., None] * what.direction * here
        q, k = q + push, k + push * first
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


def attach(model: VisionTransformer, what: Plant, shape: tuple[int, int, int, int]) -> None:
    """Put the plant into the model."""
    heads, width = shape[1:3]
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


def signals_of(model: VisionTransformer, images: Tensor, labels: Tensor) -> dict[str, np.ndarray]:
    """Every signal as a record has it, `(layers, heads)` each, and the mean probability of the label."""
    result = gmar(model, images, labels, signals=True)
    assert result.logits is not None
    found = {name: values.double().mean(0).numpy() for name, values in result.signals.items()}
    found["logit_max"] = result.signals["logit_max"].double().amax(0).numpy()
    found["importance"] = result.importance.double().mean(0).numpy()
    found["contribution"] = result.contribution.double().abs().mean(0).numpy()
    found["contribution_signed"] = result.contribution.double().mean(0).numpy()
    found["probability"] = result.logits.softmax(-1).gather(1, labels[:, None]).mean().numpy()
    return found


def run(kind: str, seed: int, probes: int, data: tuple[Tensor, Tensor], folder: Path | None = None) -> Series:
    """One run from initialisation; read from `folder` where it was run before."""
    kept = None if folder is None else folder / f"{kind.replace(' ', '_')}_{seed}_{probes}.npz"
    what = plant(kind, seed, probes)
    heads = SHAPES[seed % len(SHAPES)][1]
    layerwise = kind in ("rank", "layer scale", "cut", "all values")
    planted = [(what.layer, head) for head in range(heads)] if layerwise else [(what.layer, what.head)]
    planted += [(what.layer, what.other)] if kind == "copy" else []
    series = Series(kind, seed, [] if kind in LOOKALIKES else planted, int(np.argmax(what.strength >= 1)))
    if kept is not None and kept.exists():
        stored = dict(np.load(kept))
        series.accuracy = float(stored.pop("accuracy"))
        series.signals = stored
        return series
    series.signals, series.accuracy = _train(what, seed, probes, data)
    if kept is not None:
        np.savez_compressed(kept, accuracy=series.accuracy, **series.signals)
    return series


def _train(
    what: Plant, seed: int, probes: int, data: tuple[Tensor, Tensor]
) -> tuple[dict[str, np.ndarray], float]:
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    shape = SHAPES[seed % len(SHAPES)]
    images, labels = data
    order = rng.permutation(len(labels))
    held, pool = order[:200], order[200:]
    model = build(shape)
    attach(model, what, shape)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    rows = []
    for probe in range(probes):
        what.now = probe
        rows.append(signals_of(model.eval(), images[held[:32]], labels[held[:32]]))
        model.train()
        for _ in range(EVERY):
            batch = rng.choice(pool, 32)
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        right = (model.eval()(images[held]).argmax(-1) == labels[held]).float().mean()
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}, float(right)
