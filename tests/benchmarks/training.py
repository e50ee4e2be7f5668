"""Small Vision Transformers that learn digits and are probed meanwhile: shared by the detector's benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.optim import SGD, AdamW, Muon, Optimizer

from gmar_lightning.explain.gmar import gmar
from gmar_lightning.monitor.collapse import CollapseDetector
from gmar_lightning.monitor.events import HeadEvent

Signals = dict[str, np.ndarray]


@dataclass(frozen=True)
class Recipe:
    """A model and how it is trained."""

    depth: int = 4
    heads: int = 6
    width: int = 8
    patch: int = 8
    optimizer: str = "AdamW"
    rate: float = 2e-3
    qk_norm: bool = False
    drop_path: float = 0.0
    probes: int = 30
    every: int = 5  # optimizer steps between probes


RECIPES = {
    "AdamW, 2 x 6": Recipe(2, 6),
    "SGD, 2 x 6": Recipe(2, 6, optimizer="SGD", rate=0.05, every=20),
    "Muon, 2 x 6": Recipe(2, 6, optimizer="Muon", rate=0.01),
    "QK-norm, 2 x 6": Recipe(2, 6, qk_norm=True),
    "stochastic depth 0.2, 3 x 4": Recipe(3, 4, drop_path=0.2),
    "2 x 16": Recipe(2, 16, width=4),
    "300 probes, 2 x 3": Recipe(2, 3, width=12, probes=300),
    "24 x 3": Recipe(24, 3, rate=1e-3),
}


def digits() -> tuple[Tensor, Tensor]:
    """All digits as `(count, 1, 32, 32)`, normalised, and their labels."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    images = F.interpolate(images, (32, 32), mode="bilinear")
    return (images - images.mean()) / images.std(), torch.tensor(data.target)


def build(recipe: Recipe) -> VisionTransformer:
    """The model of a recipe."""
    return VisionTransformer(
        img_size=32,
        patch_size=recipe.patch,
        in_chans=1,
        num_classes=10,
        embed_dim=recipe.heads * recipe.width,
        depth=recipe.depth,
        num_heads=recipe.heads,
        mlp_ratio=2,
        qk_norm=recipe.qk_norm,
        drop_path_rate=recipe.drop_path,
    )


def optimizers(recipe: Recipe, model: VisionTransformer) -> list[Optimizer]:
    """Muon takes the matrices of the blocks only; AdamW has the rest, as its authors advise."""
    if recipe.optimizer == "SGD":
        return [SGD(model.parameters(), lr=recipe.rate, momentum=0.9, weight_decay=1e-4)]
    if recipe.optimizer == "AdamW":
        return [AdamW(model.parameters(), lr=recipe.rate, weight_decay=0.05)]
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    known = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in known]
    return [Muon(matrices, lr=recipe.rate, weight_decay=0.05), AdamW(rest, lr=2e-3, weight_decay=0.05)]


def signals_of(model: VisionTransformer, images: Tensor, labels: Tensor) -> Signals:
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


@dataclass
class Hooks:
    """What a plant does to a run: to the new model, before each probe, and after each optimizer step."""

    attach: Callable[[VisionTransformer], object] = lambda model: None
    before_probe: Callable[[int, VisionTransformer, list[Optimizer]], object] = lambda *_: None
    after_step: Callable[[int, VisionTransformer, list[Optimizer]], object] = lambda *_: None


def learn(
    recipe: Recipe,
    seed: int,
    data: tuple[Tensor, Tensor],
    hooks: Hooks,
    probes: int | None = None,
) -> Signals:
    """One run from initialisation.

    Returns:
        Every signal, `(probes, layers, heads)`; `loss` and `gradient` (the global norm) of the steps that
        followed each probe, `(probes, recipe.every)`; `accuracy` on 200 held-out digits at the end.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    images, labels = data
    order = rng.permutation(len(labels))
    held, pool = order[:200], order[200:]
    model = build(recipe)
    hooks.attach(model)
    several, rows = optimizers(recipe, model), []
    for probe in range(probes or recipe.probes):
        hooks.before_probe(probe, model, several)
        row = signals_of(model.eval(), images[held[:32]], labels[held[:32]])
        model.train()
        steps = []
        for _ in range(recipe.every):
            batch = rng.choice(pool, 32)
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            model.zero_grad()
            loss.backward()
            norm = torch.stack([p.grad.square().sum() for p in model.parameters() if p.grad is not None])
            steps.append((loss.item(), norm.sum().sqrt().item()))
            for optimizer in several:
                optimizer.step()
            hooks.after_step(probe, model, several)
        rows.append({**row, "loss": np.array(steps)[:, 0], "gradient": np.array(steps)[:, 1]})
    with torch.no_grad():
        right = (model.eval()(images[held]).argmax(-1) == labels[held]).float().mean()
    return {"accuracy": np.array(right), **{name: np.stack([row[name] for row in rows]) for name in rows[0]}}


def kept(folder: Path | None, name: str, make: Callable[[], Signals]) -> Signals:
    """A run's arrays, read from `folder` where it was run before."""
    if folder is None:
        return make()
    file = file_of(folder, name)
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(file, **make())
    return dict(np.load(file))


def file_of(folder: Path, name: str) -> Path:
    """Where a run of this name is kept."""
    return folder / f"{name.replace(' ', '_').replace(',', '')}.npz"


def events_of(signals: Signals) -> list[HeadEvent]:
    """What the shipped detector says, probe by probe; steps are numbers of probes."""
    detector, found = CollapseDetector(), []
    perceived = {name: v for name, v in signals.items() if v.shape == signals["importance"].shape}
    for probe, raw in enumerate(perceived.pop("importance")):
        now = {name: values[probe] for name, values in perceived.items()}
        context = {"probability": float(signals["probability"][probe])}
        found += detector.update(probe, raw, signals=now, context=context)
    return found
