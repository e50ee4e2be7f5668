"""How a record lies on disk: whole files replaced at once, lines that survive a killed process."""

import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def read_maps(path: Path) -> np.ndarray:
    """Maps of one probe's `.npz`, float32 `(images, grid_h, grid_w)`."""
    with np.load(path) as stored:
        maps = stored["heatmaps"].astype(np.float32)
        return maps * stored["scale"].reshape(-1, 1, 1) if "scale" in stored else maps


def write_maps(path: Path, maps: np.ndarray) -> None:
    """Store maps `(images, grid_h, grid_w)` as float16, with the factor of each image."""
    # float16 ends at 6e-8 and 65504: maps outside its comfortable range are stored divided by a power of two
    peak = np.nan_to_num(np.abs(maps), nan=0.0, posinf=0.0).max(axis=(1, 2), initial=0.0)
    peak = np.where(peak > 0, peak, 1.0)
    scale = np.where((peak < 2.0**-3) | (peak > 2.0**15), np.exp2(np.ceil(np.log2(peak))), 1.0)
    scale = scale.astype(np.float32)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        np.savez(file, heatmaps=(maps / scale.reshape(-1, 1, 1)).astype(np.float16), scale=scale)
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


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Records of a `history.jsonl`, in order; what follows the last line break is a torn line."""
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            record = json.loads(line)
            position(record)
        except (ValueError, KeyError, TypeError):
            warnings.warn(f"{path}: line {number} is damaged and left out", RuntimeWarning, stacklevel=3)
            continue
        records.append(record)
    return records


def position(record: Mapping[str, Any]) -> tuple[int, int]:
    """Where a probe stands in the run."""
    return record["global_step"], record["step"]


def plain(value: Any) -> Any:
    """The value as JSON knows it: NaN and infinity become null, arrays lists, dataclasses dictionaries."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    to_list = getattr(value, "tolist", None)  # numpy and torch, scalars included
    if callable(to_list):
        value = to_list()
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Path):
        return str(value)
    return value
