"""The maps of a record: a file per probe for the images, and for the heads as many probes as a budget holds."""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from gmar_lightning.monitor.disk import read_head_maps, read_maps, write_head_maps, write_maps
from gmar_lightning.monitor.record import ProbeRecord

# Bytes that the maps of heads may take in a record: about 60 probes of 8 images, 12 x 12 heads, 14 x 14 patches.
HEAD_MAP_BYTES = 16 << 20


class MapFiles:
    """Stores and finds the maps of probes.

    Args:
        folder: Of the record.
        form: Name of the form that maps of format 1 have, which did not say it.
        head_map_bytes: Budget for the maps of heads. Beyond it, every second probe loses them, but the first,
            the last and those with a new flag; if that is not enough, flagged ones too.
    """

    def __init__(self, folder: Path, form: str = "paper", head_map_bytes: int = HEAD_MAP_BYTES) -> None:
        self._maps, self._head_maps = folder / "maps", folder / "head_maps"
        self._overlays = folder / "heatmaps"
        self._form, self._budget = form, head_map_bytes
        self._sizes: dict[str, int] = {}  # of head maps, in the order of the probes
        self._flagged: set[str] = set()

    def stem(self, record: ProbeRecord) -> str:
        """Name of a probe's files; two probes of one step, before and after the first batch, get different ones."""
        plain = f"step_{record.step:08d}"
        return f"{plain}_{record.global_step:08d}" if (self._maps / f"{plain}.npz").exists() else plain

    def write(self, record: ProbeRecord, stem: str) -> None:
        """Store the maps that a record has in memory."""
        if record.maps:
            write_maps(self._maps / f"{stem}.npz", record.maps)
        if record.head_maps is not None:
            path = self._head_maps / f"{stem}.npz"
            write_head_maps(path, record.head_maps)
            self._sizes[stem] = path.stat().st_size
            if record.newly_collapsed:
                self._flagged.add(stem)
            self._keep_budget()

    def maps(self, record: ProbeRecord) -> dict[str, np.ndarray]:
        """Form to maps `(images, grid_h, grid_w)`; empty when there are none."""
        path = self._maps / f"{record.stored_maps}.npz"
        if record.stored_maps is None or not path.is_file():
            return {}
        return {form or self._form: maps for form, maps in read_maps(path).items()}

    def head_maps(self, record: ProbeRecord) -> np.ndarray | None:
        """`(images, layers, heads, grid_h, grid_w)`; None when there are none, or no more."""
        path = self._head_maps / f"{record.stored_head_maps}.npz"
        return read_head_maps(path) if record.stored_head_maps is not None and path.is_file() else None

    def keep_only(self, records: Sequence[ProbeRecord]) -> None:
        """Remove the files of all other probes, and take stock of the maps of heads that stay."""
        self._remove_others({record.stored_maps for record in records})
        of_heads = [record for record in records if record.stored_head_maps is not None]
        paths = [self._head_maps / f"{record.stored_head_maps}.npz" for record in of_heads]
        self._sizes = {path.stem: path.stat().st_size for path in paths if path.is_file()}
        self._flagged = {str(record.stored_head_maps) for record in of_heads if record.newly_collapsed}

    def _remove_others(self, stems: Collection[str | None]) -> None:
        for folder in (self._maps, self._head_maps, self._overlays):
            for stale in folder.glob("step_*"):
                if re.sub(r"\.npz$", "", stale.name) not in stems:
                    shutil.rmtree(stale) if stale.is_dir() else stale.unlink()

    def _keep_budget(self) -> None:
        while sum(self._sizes.values()) > self._budget and len(self._sizes) > 2:
            between = list(self._sizes)[1:-1]
            plain = [stem for stem in between if stem not in self._flagged]
            # Every second one goes, so that those that stay are spread over the run.
            for stem in (plain or between)[::2]:
                (self._head_maps / f"{stem}.npz").unlink(missing_ok=True)
                del self._sizes[stem]
