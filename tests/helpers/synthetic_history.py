"""Records of runs that never happened, written through the real `History`, for tests of what reads them."""

from pathlib import Path

import numpy as np

from gmar_lightning.monitor.drift import rank_correlation, top_overlap
from gmar_lightning.monitor.events import HeadEvent
from gmar_lightning.monitor.history import History
from gmar_lightning.monitor.record import ProbeRecord


def photographs(count: int = 8, size: int = 64) -> list[np.ndarray]:
    """Coloured shapes on soft backgrounds: distinct, smooth, compressible like photographs."""
    rng = np.random.default_rng(5)
    y, x = np.mgrid[:size, :size] / size
    images = []
    for _ in range(count):
        sky, ground, thing = rng.uniform(40, 220, (3, 3))
        cx, cy, radius = [*rng.uniform(0.3, 0.7, 2), rng.uniform(0.12, 0.25)]
        image = sky * (1 - y[..., None]) + ground * y[..., None]
        inside = np.hypot(x - cx, y - cy) < radius
        image[inside] = thing + 40 * (x[inside, None] - cx)
        images.append(np.clip(image + rng.normal(0, 4, image.shape), 0, 255).astype(np.uint8))
    return images


def heatmaps(probe: int, probes: int, count: int, grid: tuple[int, int]) -> np.ndarray:
    """Blobs that wander from a corner to the middle as training goes on."""
    rng = np.random.default_rng(probe)
    y, x = np.mgrid[: grid[0], : grid[1]]
    progress = probe / max(probes - 1, 1)
    maps = []
    for image in range(count):
        cy = grid[0] * (0.2 + 0.3 * progress) + image % 3
        cx = grid[1] * (0.2 + 0.3 * progress) + image % 2
        maps.append(np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / 8) + 0.05 * rng.random(grid))
    return np.stack(maps).astype(np.float32)


def head_importance(probe: int, layers: int, heads: int, dead: dict[tuple[int, int], int]) -> np.ndarray:
    """Steady heads with a little noise; each ``dead`` head fades from its probe on."""
    steady = np.random.default_rng(11).uniform(0.6, 1.6, (layers, heads))
    values = steady * np.exp(np.random.default_rng(1000 + probe).normal(0, 0.06, (layers, heads)))
    for (layer, head), since in dead.items():
        if probe >= since:
            values[layer, head] *= max(0.01, 0.5 ** (probe - since + 1))
    return values


def collapse_event(
    step: int, layer: int | None, head: int | None, kind: str = "collapsed", since: int | None = None
) -> HeadEvent:
    return HeadEvent(
        step=step,
        kind=kind,
        layer=layer,
        head=head,
        layer_name=f"blocks.{layer}.attn",
        value=0.04,
        reference=0.9,
        since_step=step if since is None else since,
        message=f"blocks.{layer}.attn head {head} {kind}: 0.90 to 0.04 of a fair share",
    )


def make_history(
    folder: Path,
    probes: int = 20,
    layers: int = 4,
    heads: int = 6,
    images: int = 3,
    grid: tuple[int, int] = (8, 8),
    dead: dict[tuple[int, int], int] | None = None,
    failed: tuple[int, ...] = (),
    every: int = 50,
    size: int = 64,
    class_names: list[str] | None = None,
    loss_at=lambda progress: 2.3 - 2.0 * progress,
    signals: bool = False,
) -> History:
    """A run of ``probes`` probes; ``dead`` maps (layer, head) to the probe at which it collapses."""
    dead = dead or {}
    names = ["cat", "dog", "fox"] if class_names is None else class_names
    history = History.create(
        folder,
        {
            "version": "0.1.0",
            "layers": [f"blocks.{layer}.attn" for layer in range(layers)],
            "heads": [heads] * layers,
            "num_images": 32,
            "num_heatmaps": images,
            "grid": list(grid),
            "labels": [index % len(names) for index in range(32)],
            "class_names": names,
            "fingerprint": "synthetic",
            "settings": {"norm": "l1", "rollout": "paper", "target": "label"},
        },
    )
    history.save_inputs(photographs(images, size))
    first = previous = None
    for probe in range(probes):
        step = max(0, probe * every - 1)
        base = {"step": step, "global_step": probe * every, "epoch": probe // 5, "seconds": 0.2}
        if probe in failed:
            history.append(ProbeRecord(**base, failure="CUDA out of memory"))
            continue
        maps = heatmaps(probe, probes, images, grid)
        importance = head_importance(probe, layers, heads, dead)
        first, previous = maps if first is None else first, maps if previous is None else previous
        progress = probe / max(probes - 1, 1)
        extra = {"entropy": 0.5 + 0 * importance, "distance": 0.4 + 0 * importance} if signals else {}
        history.append(
            ProbeRecord(
                **base,
                signals={"importance": importance, **extra},
                events=tuple(
                    collapse_event(step, *cell, since=max(0, at * every - 1))
                    for cell, at in dead.items()
                    if probe == at + 2
                ),
                flagged=tuple(cell for cell, at in dead.items() if probe >= at + 2),
                drift={
                    "rank_correlation_first": rank_correlation(maps, first),
                    "rank_correlation_previous": rank_correlation(maps, previous),
                    "top20_overlap_first": top_overlap(maps, first),
                    "top20_overlap_previous": top_overlap(maps, previous),
                },
                predictions=tuple((index + (probe < probes // 2)) % len(names) for index in range(32)),
                probabilities=(min(0.97, 0.4 + 0.5 * progress),) * 32,
                metrics={"val_acc": 0.1 + 0.85 * progress, "train_loss": loss_at(progress)},
                maps={"paper": maps},
            )
        )
        previous = maps
    # As it would be read back: with every signal, also those that a running record keeps on disk alone.
    return History.load(folder)
