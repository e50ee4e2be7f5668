"""Records of runs that never happened, written through the real `History`, for tests of what reads them."""

from pathlib import Path

import numpy as np

from gmar_lightning.monitor.drift import rank_correlation, top_overlap
from gmar_lightning.monitor.events import HeadEvent
from gmar_lightning.monitor.history import History
from gmar_lightning.monitor.record import ProbeRecord

FORMS = ("gradient", "paper", "flow", "rollout", "last_layer")


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


def heatmaps(probe: int, probes: int, count: int, grid: tuple[int, int], wander: float = 1.0) -> np.ndarray:
    """Blobs that wander from a corner to the middle as training goes on, or away from it."""
    rng = np.random.default_rng(probe)
    y, x = np.mgrid[: grid[0], : grid[1]]
    progress = wander * probe / max(probes - 1, 1)
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


def head_signals(probe: int, importance: np.ndarray) -> dict[str, np.ndarray]:
    """Every signal, plausible and different from head to head; the contribution follows the importance."""
    rng = np.random.default_rng(2000 + probe)
    between = {name: rng.uniform(0.1, 0.9, importance.shape) for name in ("sink_mass", "agreement")}
    sizes = {
        name: importance * factor
        for name, factor in {
            "output_norm": 3.0,
            "value_norm": 2.0,
            "gradient_norm": 1e-3,
            "logit_max": 10.0,
            "sink_value_norm": 1.0,
            "output_rank": 4.0,
        }.items()
    }
    contribution = 0.01 * importance**2
    return {
        **between,
        **sizes,
        "contribution": contribution,
        "contribution_signed": contribution * rng.uniform(-1, 1, importance.shape),
        "entropy": np.full(importance.shape, 0.5),
        "distance": np.full(importance.shape, 0.4),
        "similarity": rng.uniform(-0.2, 0.95, importance.shape),
        "sink_token": np.zeros(importance.shape),
        "token_similarity": np.full(importance.shape, 0.4),
    }


def head_maps(importance: np.ndarray, images: int, grid: tuple[int, int]) -> np.ndarray:
    """A blob for each head, at a place of its own and as strong as the head is important."""
    y, x = np.mgrid[: grid[0], : grid[1]]
    maps = np.zeros((images, *importance.shape, *grid), np.float32)
    places = np.random.default_rng(3).uniform(0, 1, (images, *importance.shape, 2)) * np.array(grid)
    for image, layer, head in np.ndindex(maps.shape[:3]):
        cy, cx = places[image, layer, head]
        blob = np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / 6)
        # a head without gradient has no gated map either
        maps[image, layer, head] = importance[layer, head] ** 2 * blob
    return maps


def collapse_event(
    step: int,
    layer: int | None,
    head: int | None,
    kind: str = "collapsed",
    since: int | None = None,
    **changes,
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
        **changes,
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
    forms: tuple[str, ...] = ("paper",),
    head_maps_at: tuple[int, ...] = (),
    faithfulness: dict[str, float] | None = None,
    wander: float = 1.0,
    fingerprint: str = "synthetic",
    explanation: dict | None = None,
) -> History:
    """A run of ``probes`` probes; ``dead`` maps (layer, head) to the probe at which it collapses.

    Maps of heads are kept at ``head_maps_at``, at probes with a flag and at the last one, if at any. The
    ``faithfulness`` is that of the last probe; ``explanation`` goes into the events.
    """
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
            "fingerprint": fingerprint,
            "settings": {"norm": "l1", "rollout": forms[0], "target": "label"},
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
        maps = heatmaps(probe, probes, images, grid, wander)
        importance = head_importance(probe, layers, heads, dead)
        first, previous = maps if first is None else first, maps if previous is None else previous
        progress = probe / max(probes - 1, 1)
        extra = head_signals(probe, importance) if signals else {}
        flagged_now = [cell for cell, at in dead.items() if probe == at + 2]
        kept = head_maps_at and (probe in head_maps_at or probe == probes - 1 or flagged_now)
        history.append(
            ProbeRecord(
                **base,
                signals={"importance": importance, **extra},
                events=tuple(
                    collapse_event(step, *cell, since=max(0, dead[cell] * every - 1), **(explanation or {}))
                    for cell in flagged_now
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
                faithfulness=faithfulness if probe == probes - 1 else None,
                maps={form: np.roll(maps, 2 * k, axis=2) for k, form in enumerate(forms)},
                head_maps=head_maps(importance, images, grid) if kept else None,
            )
        )
        previous = maps
    # As it would be read back: with every signal, also those that a running record keeps on disk alone.
    return History.load(folder)
