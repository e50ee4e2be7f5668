"""CPU milliseconds to draw and encode one probe: 8 overlays of 224 px as JPEG and 2 rasters as PNG.

Run with ``OMP_NUM_THREADS=1 python -m tests.benchmarks.render``.
"""

import io
import time

import numpy as np
from PIL import Image

from gmar_lightning.show.grids import evolution_raster, importance_grid
from gmar_lightning.show.render import overlay
from tests.helpers.synthetic_history import heatmaps, photographs


def encoded(picture: np.ndarray, kind: str) -> int:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, kind)
    return len(buffer.getvalue())


def measure(layers: int, heads: int, probes: int, rounds: int = 7) -> dict[str, float]:
    """Median CPU milliseconds of each part."""
    photos, maps = photographs(8, 224), heatmaps(3, 10, 8, (14, 14))
    shares = np.random.default_rng(0).dirichlet(np.full(heads, 6.0), size=(probes, layers))
    parts = {
        "8 overlays, JPEG": lambda: [
            encoded(overlay(p, m), "JPEG") for p, m in zip(photos, maps, strict=True)
        ],
        "head grid, PNG": lambda: encoded(importance_grid(shares[-1], [(1, 2)]), "PNG"),
        "head evolution, PNG": lambda: encoded(evolution_raster(shares, np.arange(probes)), "PNG"),
    }
    times: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(rounds):
        for name, part in parts.items():
            start = time.process_time()
            part()
            times[name].append(1e3 * (time.process_time() - start))
    return {name: float(np.median(values)) for name, values in times.items()}


if __name__ == "__main__":
    for layers, heads, probes in [(12, 12, 100), (24, 16, 1000)]:
        result = measure(layers, heads, probes)
        print(f"{layers} x {heads} heads, {probes} probes: {sum(result.values()):.0f} ms a probe")
        for name, value in result.items():
            print(f"    {name:22s}{value:7.1f} ms")
