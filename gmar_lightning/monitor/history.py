"""The run's record on disk: written probe by probe, read back after a crash, continued after a resume."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from gmar_lightning.monitor.disk import append_line, read_lines, write_atomically, write_jpegs
from gmar_lightning.monitor.history_page import history_page
from gmar_lightning.monitor.mapfiles import HEAD_MAP_BYTES, MapFiles
from gmar_lightning.monitor.packing import SIGNALS
from gmar_lightning.monitor.record import FORMAT, ProbeRecord, finite_only
from gmar_lightning.monitor.runfile import (
    check_next,
    model_entries,
    move_aside,
    read_run,
    with_first_segment,
    write_run,
    write_run_again,
)
from gmar_lightning.monitor.tables import GrowingTables, fitted, frame_of, rows_of

# What a running history keeps of each probe in memory; `load` has the rest.
_KEPT = ("importance", "contribution")
_OF_SEGMENT = ("labels", "num_images", "num_heatmaps")  # entries of `run` that a segment has of its own


class History:
    """What the probes of one run found, in memory and in a folder.

    Args:
        dir: The folder; None keeps the record in memory.
        run: Content of `run.json`.
        records: One for each probe, in order.
        head_map_bytes: Most bytes that the maps of heads take on disk, see `MapFiles`.

    Attributes:
        dir: The folder.
        on_disk: Whether the record is written to it.
        run: Content of `run.json`: layers, heads per layer, class names, settings, segments.
        records: One `ProbeRecord` for each probe, in order; a failed probe has `failure` and no signals.
        segment: Number of the set of probe images that probes are taken of now.
    """

    def __init__(
        self,
        dir: str | Path | None,
        run: Mapping[str, Any],
        records: Sequence[ProbeRecord] = (),
        head_map_bytes: int = HEAD_MAP_BYTES,
    ) -> None:
        self.dir, self.on_disk = Path(dir or ""), dir is not None
        self.run = with_first_segment(run)
        self.records: list[ProbeRecord] = list(records)
        self.segment: int = self.run["segments"][-1]["segment"]
        form = (self.run.get("settings") or {}).get("rollout") or "paper"
        self._files = MapFiles(self.dir, str(form), head_map_bytes)
        self._tables = GrowingTables()

    @classmethod
    def open(cls, folder: str | Path | None, run: Mapping[str, Any], resume_at: int | None = None) -> History:
        """Start the record of a run, or continue the one that a stopped run left.

        Args:
            folder: Where; None keeps the record in memory.
            run: What `run.json` shall say of the run; needs the `fingerprint` of the probe images.
            resume_at: Optimizer steps taken at the checkpoint; later probes of the record are dropped, as
                they will be taken again. None starts a new record.

        Returns:
            The record. Other probe images than before start a new segment.

        Raises:
            OSError: The folder cannot be written.
            ValueError: There is something in it that is not a record.
        """
        if folder is None:
            return cls(None, run)
        if resume_at is None or not (Path(folder) / "run.json").is_file():
            return cls.create(folder, run)
        history = cls.load(folder)
        history.rewind(resume_at)
        if history.run["segments"][-1]["fingerprint"] != run["fingerprint"]:
            changes = {name: run.get(name) for name in _OF_SEGMENT}
            history.add_segment(run["fingerprint"], resume_at, changes)
        return history

    @classmethod
    def create(cls, dir: str | Path, run: Mapping[str, Any]) -> History:
        """Start an empty record; one already in `dir` is moved to `dir/previous_01` (then 02, ...).

        Args:
            dir: The folder, made if missing.
            run: What `run.json` shall hold; `format` and the first segment are filled in.
        """
        folder = Path(dir)
        folder.mkdir(parents=True, exist_ok=True)
        move_aside(folder)
        history = cls(folder, run)
        history.update_run({})
        return history

    @classmethod
    def load(cls, dir: str | Path) -> History:
        """Read a record back, of this format or the one before; a line torn by a killed process is left out.

        Raises:
            FileNotFoundError: No record in `dir`.
            ValueError: `run.json` is unreadable, or written by a newer version of this package.
        """
        folder, run = Path(dir), read_run(Path(dir))
        heads = run.get("heads") or []
        lines = read_lines(folder / "history.jsonl", lambda line: ProbeRecord.from_json(line, heads))
        return cls(folder, run, [record for _, record in lines])

    def append(self, record: ProbeRecord) -> ProbeRecord:
        """Add one probe: its maps first, then one line, synced to disk.

        A process killed at any moment loses at most the probe in flight. Whatever the disk does, the probe is
        in `records` afterwards.

        Returns:
            The record as it is in `records`, with the names of its files and without its maps.

        Raises:
            OSError: The disk would not take it.
            ValueError: The probe does not come after the last one (call `rewind` first), or a signal has
                another number of layers than the run.
        """
        check_next(record, self.records, len(self.layers))
        kept = record = replace(record, segment=record.segment or self.segment)
        try:
            self._describe(record)
            if self.on_disk:
                record = self._write(record)
                slim = {n: record.signals[n].astype(np.float32) for n in _KEPT if n in record.signals}
                kept = replace(record, signals=slim)
        finally:
            self.records.append(replace(kept, maps={}, head_maps=None))
        return self.records[-1]

    def rewind(self, global_step: int) -> None:
        """Drop every probe after `global_step`, as a run resumed from a checkpoint will repeat them.

        Their maps and pictures go too, as does a torn line and any segment left without a probe. Lines that
        stay are not touched, whatever format they have.
        """
        self.records = [record for record in self.records if record.global_step <= global_step]
        self._tables.clear()
        lines = [
            line + b"\n"
            for line, record in read_lines(self.dir / "history.jsonl", ProbeRecord.from_json)
            if record.global_step <= global_step
        ]
        write_atomically(self.dir / "history.jsonl", b"".join(lines))
        self._files.keep_only(self.records)
        used = {0, *(record.segment for record in self.records)}
        segments = [entry for entry in self.run["segments"] if entry["segment"] in used]
        self.segment = segments[-1]["segment"]
        self.update_run({"format": FORMAT, "segments": segments})

    def add_segment(self, fingerprint: str, from_step: int, changes: Mapping[str, Any] | None = None) -> int:
        """Note that the probe images changed; values of two segments are not comparable image by image.

        Args:
            fingerprint: Of the new images.
            from_step: First step probed with them.
            changes: What else differs from the first segment (`labels`, `num_images`, `num_heatmaps`,
                `grid`).

        Returns:
            The number that the following records carry as `segment`.
        """
        self.segment = 1 + max(entry["segment"] for entry in self.run["segments"])
        entry = {
            "segment": self.segment,
            "fingerprint": fingerprint,
            "from_step": from_step,
            **(changes or {}),
        }
        self.update_run({"segments": [*self.run["segments"], entry]})
        return self.segment

    def update_run(self, changes: Mapping[str, Any]) -> None:
        """Change entries of `run.json`, for what is known only after the first probe."""
        self.run.update(changes)
        if self.on_disk:
            write_run(self.dir, self.run)

    def ends_of_segment(self, form: str) -> tuple[int, np.ndarray | None, np.ndarray | None]:
        """The present segment, and its first and last maps of a form, for those that go on with it."""
        mapped = [record for record in self.records if record.segment == self.segment and record.stored_maps]
        if not mapped:
            return self.segment, None, None
        return self.segment, self.maps_of(mapped[0]).get(form), self.maps_of(mapped[-1]).get(form)

    def save_inputs(self, images: Sequence[np.ndarray], segment: int | None = None) -> list[Path]:
        """Write the clean photographs, each uint8 `(height, width, 3)`; returns their paths."""
        if not self.on_disk:
            return []
        return write_jpegs(self._input_dir(self.segment if segment is None else segment), images)

    def save_overlays(self, record: ProbeRecord, images: Sequence[np.ndarray]) -> list[Path]:
        """Write a probe's overlays, each uint8 `(height, width, 3)`; returns their paths."""
        return write_jpegs(self.dir / "heatmaps" / str(record.stored_maps), images)

    @property
    def steps(self) -> np.ndarray:
        """Step of each probe, `(probes,)`, failed ones included."""
        return np.array([record.step for record in self.records], dtype=np.int64)

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
        return [finite_only(asdict(event)) for record in self.records for event in record.events]

    def input_paths(self, segment: int = 0) -> list[Path]:
        """The clean photographs of a segment, in probe order."""
        return sorted(self._input_dir(segment).glob("*.jpg"))

    def segment_run(self, segment: int) -> dict[str, Any]:
        """`run` with the entries that differ in `segment`."""
        changes = next((entry for entry in self.run["segments"] if entry["segment"] == segment), {})
        return {**self.run, **changes}

    def values(self, name: str, step: int | None = None) -> np.ndarray:
        """A signal per head, at one step or of all probes; a running record leaves most of them on disk.

        Args:
            name: One of `packing.SIGNALS`, or `"shares"`.
            step: One probe, or None for all.

        Returns:
            `(layers, heads)`, or `(probes, layers, heads)`; NaN for a failed probe, for a value that was not
            recorded, and where a layer has fewer heads than the widest.

        Raises:
            KeyError: No probe at `step`, or no such signal.
        """
        if name not in ("shares", *SIGNALS) and not any(name in record.signals for record in self.records):
            raise KeyError(f"{name!r} is not one of shares, {', '.join(SIGNALS)}")
        if step is not None:
            return self.table(self._at(step), name)
        return self._tables.filled(name, self._shape(), self.records, self.table)

    def importance(self, step: int | None = None) -> np.ndarray:
        """Raw importance `(layers, heads)` at `step`, or of all probes `(probes, layers, heads)`."""
        return self.values("importance", step)

    def contribution(self, step: int | None = None) -> np.ndarray:
        """What each head adds to the score, without sign, shaped as `importance`."""
        return self.values("contribution", step)

    def shares(self, step: int | None = None) -> np.ndarray:
        """Each head's share of its layer's importance, shaped as `importance`."""
        return self.values("shares", step)

    def heatmaps(self, step: int, form: str | None = None) -> np.ndarray:
        """Raw maps of a probe, float32 `(images, grid_h, grid_w)`, of the primary form or of another.

        Raises:
            KeyError: No probe at `step`, or it has no maps, or not of this form.
        """
        maps = self.maps_of(self._at(step))
        if not maps or (form is not None and form not in maps):
            raise KeyError(f"no heatmaps {'' if form is None else f'{form!r} '}were recorded at step {step}")
        return maps[form] if form is not None else next(iter(maps.values()))

    def maps_of(self, record: ProbeRecord) -> dict[str, np.ndarray]:
        """A record's maps: form to float32 `(images, grid_h, grid_w)`, the primary form first."""
        return self._files.maps(record)

    def head_maps_of(self, record: ProbeRecord) -> np.ndarray | None:
        """A record's maps of heads `(images, layers, heads, grid_h, grid_w)`; None where none were kept."""
        return self._files.head_maps(record)

    def metric(self, name: str) -> np.ndarray:
        """A value the trainer had logged at each probe, `(probes,)`; NaN where it had not."""
        return np.array([record.metrics.get(name, np.nan) for record in self.records], dtype=np.float64)

    def rows(self) -> Iterator[dict[str, Any]]:
        """One tidy row per probe and head: step, layer, head, importance, share, flagged, ..."""
        names = [name for name in SIGNALS if any(name in record.signals for record in self.records)]
        for record in self.records:
            tables = {name: self.table(record, name) for name in names}
            tables["share"] = self.table(record, "shares")
            if record.importance is not None:
                yield from rows_of(record, self.layers, self.heads, tables)

    def to_pandas(self) -> Any:
        """`rows` as a `pandas.DataFrame`.

        Raises:
            ImportError: pandas is not installed.
        """
        return frame_of(self.rows())

    def _repr_html_(self) -> str:
        """What a notebook shows: the last pictures, and every head over the probes."""
        return history_page(self)

    def table(self, record: ProbeRecord, name: str) -> np.ndarray:
        """A record's signal `name` as `(layers, heads)` of this run, NaN where there is none."""
        table = record.shares if name == "shares" else record.signals.get(name)
        return fitted(table, self._shape())

    def _shape(self) -> tuple[int, int]:
        return len(self.heads), max(self.heads, default=0)

    def _at(self, step: int) -> ProbeRecord:
        for record in reversed(self.records):
            if record.step == step:
                return record
        raise KeyError(f"no probe at step {step}")

    def _describe(self, record: ProbeRecord) -> None:
        if not self.layers and record.importance is not None:
            self.update_run(model_entries(record))

    def _write(self, record: ProbeRecord) -> ProbeRecord:
        stem = self._files.stem(record)
        record = replace(
            record,
            stored_maps=stem if record.maps else None,
            stored_head_maps=stem if record.head_maps is not None else None,
        )
        write_run_again(self.dir, self.run)
        self._files.write(record, stem)
        line = json.dumps(record.to_json(), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        append_line(self.dir / "history.jsonl", line)
        return record

    def _input_dir(self, segment: int) -> Path:
        return self.dir / "inputs" / f"segment_{segment:02d}" if segment else self.dir / "inputs"
