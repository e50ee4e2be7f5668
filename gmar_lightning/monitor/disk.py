"""How a record lies on disk: whole files replaced at once, lines that survive a killed process."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

Read = TypeVar("Read")

# Maps are stored in whole numbers from 0 to this; the value after it is a patch that is not finite.
_LEVELS = 254
_NOT_FINITE = 255


def read_maps(path: Path) -> dict[str, np.ndarray]:
    """Maps of one probe's `.npz`: form to float32 `(images, grid_h, grid_w)`, the primary form first."""
    with np.load(path) as stored:
        if "forms" in stored:
            maps = _restored(stored["levels"], stored["low"], stored["high"])
            return dict(zip(stored["forms"].tolist(), maps, strict=True))
        # Format 1: one form without its name, float16, large and small ones divided by a factor per image.
        maps = stored["heatmaps"].astype(np.float32)
        return {"": maps * stored["scale"].reshape(-1, 1, 1) if "scale" in stored else maps}


def write_maps(path: Path, maps: Mapping[str, np.ndarray]) -> None:
    """Store maps, form to `(images, grid_h, grid_w)`, in 8 bits between the extremes of each image's map."""
    stacked = np.stack(list(maps.values()))
    # All axes behind form and image are one map: the grid's two, or the one of a token sequence.
    levels, low, high = _quantised(stacked, map_axes=stacked.ndim - 2)
    write_arrays(path, {"forms": np.array(list(maps)), "levels": levels, "low": low, "high": high})


def read_head_maps(path: Path) -> np.ndarray:
    """Maps of heads, float32 `(images, layers, heads, grid_h, grid_w)`."""
    with np.load(path) as stored:
        return _restored(stored["levels"], stored["low"], stored["high"])


def write_head_maps(path: Path, maps: np.ndarray) -> None:
    """Store `(images, layers, heads, grid_h, grid_w)` in 8 bits between the extremes of each map."""
    levels, low, high = _quantised(maps, map_axes=2)
    write_arrays(path, {"levels": levels, "low": low, "high": high})


def _quantised(maps: np.ndarray, map_axes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    maps = np.asarray(maps, dtype=np.float32)
    axes = tuple(range(maps.ndim - map_axes, maps.ndim))
    known = np.isfinite(maps)
    low = np.where(known, maps, np.inf).min(axis=axes, keepdims=True)
    high = np.where(known, maps, -np.inf).max(axis=axes, keepdims=True)
    low, high = np.where(np.isfinite(low), low, 0.0), np.where(np.isfinite(high), high, 0.0)
    spread = np.where(high > low, high - low, 1.0)
    levels = np.where(known, (np.where(known, maps, low) - low) / spread * _LEVELS, _NOT_FINITE)
    return levels.round().astype(np.uint8), low.astype(np.float32), high.astype(np.float32)


def _restored(levels: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    maps = low + levels.astype(np.float32) / _LEVELS * (high - low)
    return np.where(levels == _NOT_FINITE, np.float32(np.nan), maps)


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write an `.npz` so that a reader sees all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)
    partial.replace(path)


def write_jpegs(folder: Path, images: Sequence[np.ndarray]) -> list[Path]:
    """Write uint8 images `(height, width, 3)` as `00.jpg`, `01.jpg`, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{index:02d}.jpg" for index in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image).save(path, quality=88)
    return paths


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new, never half."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def append_line(path: Path, line: str) -> None:
    """Add a line and wait until the disk has it; the rest of a torn line before it is cut off."""
    path.touch()
    with path.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(end - 1)
            if file.read(1) != b"\n":
                file.seek(0)
                file.seek(file.read().rfind(b"\n") + 1)
                file.truncate()
        file.write(line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: Path, read: Callable[[Mapping[str, Any]], Read]) -> list[tuple[bytes, Read]]:
    """Lines of a `history.jsonl`, in order, as they are and as `read` understands them.

    What follows the last line break is a torn line; a line that cannot be understood is left out with a
    warning.
    """
    if not path.is_file():
        return []
    lines = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            lines.append((line, read(json.loads(line))))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            warnings.warn(f"{path}: line {number} is damaged and left out", RuntimeWarning, stacklevel=3)
    return lines
