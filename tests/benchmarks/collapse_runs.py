"""Small Vision Transformers trained on real digits, with heads made to die, to dip or to be born dead."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from gmar_lightning.explain.gmar import gmar
from gmar_lightning.monitor.collapse import CollapseDetector
from gmar_lightning.monitor.events import HeadEvent
from tests.helpers.planted import FATAL, fall

EVERY = 5  # optimizer steps between probes
SHAPES = [(4, 6, 8, 8), (2, 3, 12, 8), (6, 4, 8, 4), (4, 12, 4, 8), (3, 16, 4, 8), (12, 3, 8, 8)]
"""Depth, heads, head width, patch size; one for each seed, in turn."""


@dataclass
class Run:
    """What a training run left behind.

    Attributes:
        importance: ``(probes, layers, heads)``; entropy likewise.
        gates: ``(probes, layers, heads)``, what the plant let through of each head.
        planted: Heads that were tampered with, as ``(layer, head)``.
        events: What the shipped detector said, with the probe's number as step.
        ablation: For each flagged head, KL divergence of the prediction when it is zeroed at the moment of
            its flag, and the same for a random unflagged head of the layer.
        accuracy: On held-out digits at the end.
    """

    kind: str
    seed: int
    shape: tuple[int, int, int, int]
    importance: np.ndarray
    entropy: np.ndarray
    gates: np.ndarray
    planted: list[tuple[int, int]]
    events: list[HeadEvent]
    ablation: list[tuple[float, float]]
    accuracy: float

    @property
    def dead(self) -> dict[tuple[int, int], int]:
        """Probe from which each head that dies after having lived is dead."""
        found = {}
        for layer, head in self.planted:
            gate = self.gates[:, layer, head]
            if gate[0] > FATAL and (gate <= FATAL).sum() > 2:
                found[layer, head] = int(np.argmax(gate <= FATAL))
        return found


@dataclass
class Plant:
    """What is done to which heads: a gate for each probe, and where it acts."""

    heads: list[tuple[int, int]] = field(default_factory=list)
    gate: np.ndarray | None = None
    place: str = "output"
    rate: float = 2e-3
    decay: float = 0.05


def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    images = F.interpolate(images, (32, 32), mode="bilinear")
    return (images - images.mean()) / images.std(), torch.tensor(data.target)


def plant(kind: str, seed: int, probes: int) -> Plant:
    """The plant of a kind for a seed."""
    rng = np.random.default_rng([seed, 7])
    depth, heads = SHAPES[seed % len(SHAPES)][:2]
    layer, order = int(rng.integers(depth)), [int(head) for head in rng.permutation(heads)]
    start, end = int(rng.integers(15, probes // 2)), float(rng.choice([0.0, 0.02, 0.05]))
    length = int(rng.choice([1, 5, 20]))
    place = ("output", "value")[seed % 2]
    ones = np.ones(probes)
    window = (np.arange(probes) >= start) & (np.arange(probes) < start + 12)
    some = {"several": order[: max(2, heads // 2)], "all but one": order[:-1], "whole layer": order}
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
        "uniform": lambda: fall(probes, start, 1, 0.0),
        "one token": lambda: fall(probes, start, 1, 100.0),
    }
    if kind == "high rate":
        return Plant(rate=2e-2)
    if kind == "strong decay":
        return Plant(decay=30.0)
    if kind not in gates:
        return Plant()
    place = "query" if kind in ("uniform", "one token") else place
    return Plant([(layer, head) for head in some.get(kind, order[:1])], gates[kind](), place)


def build(shape: tuple[int, int, int, int]) -> VisionTransformer:
    depth, heads, width, patch = shape
    return VisionTransformer(
        img_size=32,
        patch_size=patch,
        in_chans=1,
        num_classes=10,
        embed_dim=heads * width,
        depth=depth,
        num_heads=heads,
        mlp_ratio=2,
    )


def attach(model: VisionTransformer, gates: dict[str, Tensor], width: int) -> None:
    """Multiply each head's query, value or output by its gate, ``(layers, heads)`` for each place."""
    for index, block in enumerate(model.blocks):

        def scale(_: object, __: object, qkv: Tensor, index: int = index) -> Tensor:
            query, key, value = qkv.chunk(3, dim=-1)
            query = query * gates["query"][index].repeat_interleave(width)
            value = value * gates["value"][index].repeat_interleave(width)
            return torch.cat([query, key, value], dim=-1)

        def scale_output(_: object, inputs: tuple[Tensor, ...], index: int = index) -> tuple[Tensor]:
            return (inputs[0] * gates["output"][index].repeat_interleave(width),)

        block.attn.qkv.register_forward_hook(scale)
        block.attn.proj.register_forward_pre_hook(scale_output)


@contextmanager
def without(gates: Tensor, layer: int, head: int) -> Iterator[None]:
    before = gates[layer, head].item()
    gates[layer, head] = 0.0
    yield
    gates[layer, head] = before


@torch.no_grad()
def divergence(model: VisionTransformer, images: Tensor, gates: Tensor, layer: int, head: int) -> float:
    """KL divergence of the mean prediction from the intact one when a head is zeroed."""
    model.eval()
    intact = model(images).log_softmax(-1)
    with without(gates, layer, head):
        changed = model(images).log_softmax(-1)
    model.train()
    return float((intact.exp() * (intact - changed)).sum(-1).mean())


def train(kind: str, seed: int, probes: int, data: tuple[Tensor, Tensor]) -> Run:
    """One run, from initialisation, with its plant, judged on line by the shipped detector."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    shape, what = SHAPES[seed % len(SHAPES)], plant(kind, seed, probes)
    depth, heads = shape[:2]
    images, labels = data
    order = rng.permutation(len(labels))
    held, pool = order[:200], order[200:]
    model = build(shape)
    gates = {place: torch.ones(depth, heads) for place in ("query", "value", "output")}
    attach(model, gates, shape[2])
    attention = [p for name, p in model.named_parameters() if "attn" in name]
    others = [p for name, p in model.named_parameters() if "attn" not in name]
    optimizer = torch.optim.AdamW(
        [{"params": attention, "weight_decay": what.decay}, {"params": others, "weight_decay": 0.05}],
        lr=what.rate,
    )
    detector, events, ablation = CollapseDetector(), [], []
    importance, entropy, passed = [], [], np.ones((probes, depth, heads))
    for probe in range(probes):
        for layer, head in what.heads:
            gates[what.place][layer, head] = passed[probe, layer, head] = float(what.gate[probe])
        model.eval()
        found = gmar(model, images[held[:32]], labels[held[:32]], signals=True)
        model.train()
        importance.append(found.importance.mean(0).double().numpy())
        entropy.append(found.signals["entropy"].mean(0).double().numpy())
        new = detector.update(probe, importance[-1], found.layers)
        for event in new:
            if event.kind == "collapsed":
                control = [h for h in range(heads) if (event.layer, h) not in detector.flagged]
                at = [event.head, int(rng.choice(control))] if control else [event.head]
                kl = [divergence(model, images[held], gates["output"], event.layer, head) for head in at]
                ablation.append((kl[0], kl[1] if control else float("nan")))
        events += new
        for _ in range(EVERY):
            batch = rng.choice(pool, 32)
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        accuracy = float((model.eval()(images[held]).argmax(-1) == labels[held]).float().mean())
    return Run(
        kind,
        seed,
        shape,
        np.stack(importance),
        np.stack(entropy),
        passed,
        what.heads,
        events,
        ablation,
        accuracy,
    )


def spread_of_shares(seed: int, data: tuple[Tensor, Tensor], steps: int = 300) -> dict[int, float]:
    """Coefficient of variation of a head's share between disjoint probe batches of 8, 32 and 128 images."""
    torch.manual_seed(seed)
    images, labels = data
    model = build(SHAPES[0])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(steps):
        batch = torch.arange(step * 32, step * 32 + 32) % 1000
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    held = slice(1000, 1000 + 6 * 128)
    scores = gmar(model.eval(), images[held], labels[held], micro_batch_size=128).importance.double()
    spread = {}
    for size in (8, 32, 128):
        batches = scores.unflatten(0, (-1, size)).mean(1)
        share = batches / batches.sum(-1, keepdim=True)
        spread[size] = float((share.std(0) / share.mean(0)).mean())
    return spread
