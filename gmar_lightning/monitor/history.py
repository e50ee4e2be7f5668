"""The run's record on disk: written probe by probe, read back after a crash, continued after a resume."""

import importlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gmar_lightning.monitor.disk import (
    append_line,
    plain,
    position,
    read_lines,
    read_maps,
    write_atomically,
    write_jpegs,
    write_maps,
)

FORMAT = 1
HEAD_VALUES = ("importance", "shares", "entropy", "distance", "output_norm")
_RECORD_PARTS = ("run.json", "history.jsonl", "inputs", "maps", "heatmaps", "report.html")


class History:
    """What the probes of one run found, in memory and in a folder.

    Attributes:
        dir: the folder.
        run: content of `run.json`: layers, heads per layer, class names, settings, segments.
        records: one dictionary per probe, in order; a failed probe has `error` and no importance.
    """

    def __init__(self, dir: str | Path, run: Mapping[str, Any], records: Sequence[Mapping[str, Any]] = ()):
        self.dir = Path(dir)
        self.run: dict[str, Any] = dict(run)
        self.records: list[dict[str, Any]] = [dict(record) for record in records]

    @classmethod
    def create(cls, dir: str | Path, run: Mapping[str, Any]) -> "History":
        """Start an empty record; one already in `dir` is moved to `dir/previous_01` (then 02, ...).

        Args:
            dir: the folder, made if missing.
            run: what `run.json` shall hold; `format` and the first segment are filled in.
        """
        folder = Path(dir)
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "run.json").exists():
            _move_aside(folder)
        first = {"segment": 0, "fingerprint": run.get("fingerprint"), "from_step": 0}
        history = cls(folder, {"format": FORMAT, "layers": [], "heads": [], "segments": [first], **run})
        history._write_run()
        return history

    @classmethod
    def load(cls, dir: str | Path) -> "History":
        """Read a record back; a line torn by a killed process is left out.

        Raises:
            FileNotFoundError: no record in `dir`.
            ValueError: `run.json` is unreadable, or written by a newer version of this package.
        """
        folder = Path(dir)
        if not (folder / "run.json").is_file():
            raise FileNotFoundError(f"no GMAR record in {folder}: run.json is missing")
        try:
            run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{folder / 'run.json'} is not valid JSON: {error}") from error
        if not isinstance(run, dict) or run.get("format") != FORMAT:
            raise ValueError(f"{folder / 'run.json'} is not a record of format {FORMAT}")
        return cls(folder, run, read_lines(folder / "history.jsonl"))

    def append(self, record: Mapping[str, Any], heatmaps: np.ndarray | None = None) -> None:
        """Add one probe: its maps first, then one line, synced to disk.

        A process killed at any moment loses at most the probe in flight. NaN and infinity become null,
        arrays become lists, dataclasses become dictionaries.

        Args:
            record: needs `step` and `global_step`.
            heatmaps: `(images, grid_h, grid_w)`, stored as float16.

        Raises:
            ValueError: the probe does not come after the last one (call `rewind` first), or a table of
                head values has another number of layers than the run.
        """
        line = plain(dict(record))
        if self.records and position(line) <= position(self.records[-1]):
            raise ValueError(
                f"probe at global_step {line['global_step']} does not come after the last recorded one "
                f"({self.records[-1]['global_step']}); rewind the record first"
            )
        self._check_layers(line)
        line["maps"] = None
        if heatmaps is not None:
            line["maps"] = self.stem(line["step"], line["global_step"])
            write_maps(self.dir / "maps" / f"{line['maps']}.npz", np.asarray(heatmaps, dtype=np.float32))
        append_line(self.dir / "history.jsonl", json.dumps(line, ensure_ascii=False, allow_nan=False))
        self.records.append(line)

    def remember(self, record: Mapping[str, Any]) -> None:
        """Add one probe in memory alone, for a run whose folder cannot be written."""
        self.records.append({**plain(dict(record)), "maps": None})

    def rewind(self, global_step: int) -> None:
        """Drop every probe after `global_step`, as a run resumed from a checkpoint will repeat them.

        Their maps and pictures go too, as does a torn line and any segment left without a probe.
        """
        kept = [record for record in self.records if record["global_step"] <= global_step]
        self.records = kept
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept)
        write_atomically(self.dir / "history.jsonl", text.encode())
        stems = {self._stem_of(index) for index in range(len(kept))}
        for stale in [*self.dir.glob("maps/step_*.npz"), *self.dir.glob("heatmaps/step_*")]:
            if stale.name.removesuffix(".npz") not in stems:
                shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
        used = {0, *(record.get("segment", 0) for record in kept)}
        self.update_run({"segments": [s for s in self.run["segments"] if s["segment"] in used]})

    def add_segment(self, fingerprint: str, from_step: int, changes: Mapping[str, Any] | None = None) -> int:
        """Note that the probe images changed; values of two segments are not comparable image by image.

        Args:
            fingerprint: of the new images.
            from_step: first step probed with them.
            changes: what else differs from the first segment (`labels`, `num_images`,
                `num_heatmaps`, `grid`).

        Returns:
            The number that the following records carry as `segment`.
        """
        number = 1 + max(segment["segment"] for segment in self.run["segments"])
        segment = {"segment": number, "fingerprint": fingerprint, "from_step": from_step, **(changes or {})}
        self.update_run({"segments": [*self.run["segments"], plain(segment)]})
        return number

    def update_run(self, changes: Mapping[str, Any]) -> None:
        """Change entries of `run.json`, for what is known only after the first probe."""
        self.run.update(changes)
        self._write_run()

    def save_inputs(self, images: Sequence[np.ndarray], segment: int = 0) -> list[Path]:
        """Write the clean photographs, each uint8 `(height, width, 3)`; returns their paths."""
        return write_jpegs(self._input_dir(segment), images)

    def save_overlays(self, step: int, global_step: int, images: Sequence[np.ndarray]) -> list[Path]:
        """Write a probe's overlays, each uint8 `(height, width, 3)`; returns their paths."""
        return write_jpegs(self.dir / "heatmaps" / self.stem(step, global_step), images)

    def stem(self, step: int, global_step: int) -> str:
        """Name of a probe's files. Steps 0 before and after the first batch get different ones."""
        twin = any(r["step"] == step and r["global_step"] != global_step for r in self.records)
        return f"step_{step:08d}_{global_step:08d}" if twin else f"step_{step:08d}"

    @property
    def steps(self) -> np.ndarray:
        """Step of each probe, `(probes,)`, failed ones included."""
        return np.array([record["step"] for record in self.records], dtype=np.int64)

    @property
    def layers(self) -> list[str]:
        """Module path of each attention layer, in forward order."""
        return list(self.run.get("layers") or [])

    @property
    def heads(self) -> list[int]:
        """Number of heads of each layer."""
        return list(self.run.get("heads") or [])

    @property
    def events(self) -> list[dict[str, Any]]:
        """Every flag of the run, as dictionaries with the fields of `HeadEvent`."""
        return [event for record in self.records for event in record.get("events") or []]

    def input_paths(self, segment: int = 0) -> list[Path]:
        """The clean photographs of a segment, in probe order."""
        return sorted(self._input_dir(segment).glob("*.jpg"))

    def segment_run(self, segment: int) -> dict[str, Any]:
        """`run` with the entries that differ in `segment`."""
        changes = next((s for s in self.run["segments"] if s["segment"] == segment), {})
        return {**self.run, **changes}

    def values(self, name: str, step: int | None = None) -> np.ndarray:
        """Head values called `name`, one of `HEAD_VALUES`.

        Args:
            name: for example `"entropy"`.
            step: one probe, or None for all.

        Returns:
            `(layers, heads)`, or `(probes, layers, heads)`; NaN for a failed probe, for a value that
            was not recorded, and where a layer has fewer heads than the widest.

        Raises:
            KeyError: no probe at `step`, or no such value.
        """
        if name not in HEAD_VALUES:
            raise KeyError(f"{name!r} is not one of {', '.join(HEAD_VALUES)}")
        if step is not None:
            return self.table(self._at(step), name)
        tables = [self.table(record, name) for record in self.records]
        return np.stack(tables) if tables else np.empty((0, *self._shape()))

    def importance(self, step: int | None = None) -> np.ndarray:
        """Raw importance `(layers, heads)` at `step`, or of all probes `(probes, layers, heads)`."""
        return self.values("importance", step)

    def shares(self, step: int | None = None) -> np.ndarray:
        """Each head's share of its layer's importance, shaped as `importance`."""
        return self.values("shares", step)

    def heatmaps(self, step: int) -> np.ndarray:
        """Raw maps of a probe, float32 `(images, grid_h, grid_w)`.

        Raises:
            KeyError: no probe at `step`, or it has no maps.
        """
        maps = self.maps_of(self._at(step))
        if maps is None:
            raise KeyError(f"no heatmaps were recorded at step {step}")
        return maps

    def maps_of(self, record: Mapping[str, Any]) -> np.ndarray | None:
        """A record's maps, float32 `(images, grid_h, grid_w)`; None if there are none."""
        path = self.dir / "maps" / f"{record.get('maps')}.npz"
        return read_maps(path) if record.get("maps") and path.is_file() else None

    def metric(self, name: str) -> np.ndarray:
        """A value the trainer had logged at each probe, `(probes,)`; NaN where it had not."""
        found = [(record.get("metrics") or {}).get(name) for record in self.records]
        return np.array([np.nan if value is None else value for value in found], dtype=np.float64)

    def rows(self) -> Iterator[dict[str, Any]]:
        """One tidy row per probe and head: step, layer, head, importance, share, flagged, ..."""
        names = ["importance", "shares", *(n for n in HEAD_VALUES[2:] if any(r.get(n) for r in self.records))]
        for record in self.records:
            tables = {name: self.table(record, name) for name in names}
            flagged = {tuple(cell) for cell in record.get("flagged") or []}
            for layer, width in enumerate(self.heads if record.get("importance") else []):
                for head in range(width):
                    yield {
                        "step": record["step"],
                        "global_step": record["global_step"],
                        "epoch": record.get("epoch"),
                        "segment": record.get("segment", 0),
                        "layer": layer,
                        "layer_name": self.layers[layer],
                        "head": head,
                        **{name.rstrip("s"): float(table[layer, head]) for name, table in tables.items()},
                        "flagged": (layer, head) in flagged,
                    }

    def to_pandas(self) -> Any:
        """`rows` as a `pandas.DataFrame`.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            pandas = importlib.import_module("pandas")
        except ImportError as error:
            raise ImportError("History.to_pandas needs pandas: pip install pandas") from error
        return pandas.DataFrame(list(self.rows()))

    def _shape(self) -> tuple[int, int]:
        return len(self.heads), max(self.heads, default=0)

    def table(self, record: Mapping[str, Any], name: str) -> np.ndarray:
        """A record's head values `name` as `(layers, heads)`, NaN where there are none."""
        table = np.full(self._shape(), np.nan)
        for layer, row in enumerate((record.get(name) or [])[: len(table)]):
            cells = row[: self.heads[layer]]
            table[layer, : len(cells)] = [np.nan if cell is None else cell for cell in cells]
        return table

    def _at(self, step: int) -> dict[str, Any]:
        for record in reversed(self.records):
            if record["step"] == step:
                return record
        raise KeyError(f"no probe at step {step}")

    def _stem_of(self, index: int) -> str:
        record = self.records[index]
        if record.get("maps"):
            return record["maps"]
        return History(self.dir, self.run, self.records[:index]).stem(record["step"], record["global_step"])

    def _check_layers(self, line: Mapping[str, Any]) -> None:
        for name in HEAD_VALUES:
            table = line.get(name)
            if table is not None and self.layers and len(table) != len(self.layers):
                raise ValueError(f"{name} has {len(table)} layers, the run has {len(self.layers)}")

    def _input_dir(self, segment: int) -> Path:
        return self.dir / "inputs" / f"segment_{segment:02d}" if segment else self.dir / "inputs"

    def _write_run(self) -> None:
        text = json.dumps(plain(self.run), ensure_ascii=False, indent=1, allow_nan=False)
        write_atomically(self.dir / "run.json", text.encode())


def _move_aside(folder: Path) -> None:
    number = 1 + max((int(path.name[9:]) for path in folder.glob("previous_[0-9]*")), default=0)
    target = folder / f"previous_{number:02d}"
    target.mkdir()
    for name in _RECORD_PARTS:
        if (folder / name).exists():
            (folder / name).rename(target / name)
