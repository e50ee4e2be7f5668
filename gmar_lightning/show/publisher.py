"""Publishes a run's probes: local record, loggers, report. Runs on one process; no sink can stop another."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gmar_lightning.monitor.history import History
from gmar_lightning.monitor.probe import ProbeBatch
from gmar_lightning.monitor.record import DriftTracker
from gmar_lightning.show import panels
from gmar_lightning.show.console import closing_lines, event_table
from gmar_lightning.show.loggers import adapter_for
from gmar_lightning.show.publication import Adapter, Ending, Publication
from gmar_lightning.show.report import write_report
from gmar_lightning.show.wandb_logger import offline_run
from gmar_lightning.version import __version__


class Publisher:
    """Writes each probe to the record and shows it to the loggers.

    A sink that fails (a full disk, a logger that raises) is reported once through `warn`; the others and the
    training go on.

    Args:
        history: The record to continue.
        loggers: The trainer's loggers.
        images: The photographs that are drawn, uint8 `(height, width, 3)`.
        labels: Of all probe images, or None.
        names: Class names, or None.
        segment: Segment of the record.
        settings: What `config.gmar` shall say.
        per_head: Whether every head gets a scalar.
        media_every: Pictures at every so-manieth probe.
        on_disk: Whether the record is written to disk at all.
        warn: Says a sentence on the console.
    """

    def __init__(
        self,
        history: History,
        loggers: Sequence[Any],
        images: Sequence[np.ndarray],
        *,
        labels: Sequence[int] | None = None,
        names: Sequence[str] | None = None,
        segment: int = 0,
        settings: Mapping[str, Any],
        per_head: bool = False,
        media_every: int = 1,
        on_disk: bool = True,
        warn: Callable[[str], None] = print,
    ) -> None:
        self.history, self.loggers, self.images = history, list(loggers), images
        self._labels, self._names, self._segment = labels, names, segment
        self._settings, self._per_head = dict(settings), per_head
        self._media_every, self._on_disk, self._warn = media_every, on_disk, warn
        self._adapters = [adapter_for(logger) for logger in self.loggers]
        self._opened, self._warned = False, set[str]()
        self._count = self._at = 0
        self.drift = DriftTracker(*self._recorded_maps())

    @classmethod
    def open(
        cls,
        folder: Path | None,
        probe: ProbeBatch,
        images: Sequence[np.ndarray],
        loggers: Sequence[Any],
        *,
        names: Sequence[str] | None,
        settings: Mapping[str, Any],
        resume_at: int | None,
        per_head: bool,
        media_every: int,
        warn: Callable[[str], None],
    ) -> Publisher:
        """Start the record of a run, or continue the one a killed run left.

        Args:
            folder: Where; None keeps the record in memory.
            probe: The probe images.
            images: Those that are drawn.
            loggers: The trainer's loggers.
            names: Class names, or None.
            settings: What `config.gmar` and `run.json` shall say.
            resume_at: Optimizer steps taken at the checkpoint; later probes of the record are dropped, as
                they will be taken again. None starts a new record.
            per_head: Whether every head gets a scalar.
            media_every: Pictures at every so-manieth probe.
            warn: Says a sentence on the console.
        """
        labels = None if probe.labels is None else probe.labels.tolist()
        run = {
            "version": __version__,
            "num_images": len(probe),
            "num_heatmaps": len(images),
            "labels": labels,
            "class_names": None if names is None else list(names),
            "fingerprint": probe.fingerprint,
            "settings": dict(settings),
        }
        history, on_disk, segment = (
            History(folder or "", {**run, "layers": [], "heads": []}),
            folder is not None,
            0,
        )
        if folder is not None:
            try:
                history, segment = _opened(folder, run, resume_at)
                history.save_inputs(images, segment)
            except (OSError, ValueError) as error:
                on_disk = False
                warn(
                    f"GMARCallback: no record can be written to {folder} ({error}); the run goes on without it"
                )
        return cls(
            history,
            loggers,
            images,
            labels=labels,
            names=names,
            segment=segment,
            settings=settings,
            per_head=per_head,
            media_every=media_every,
            on_disk=on_disk,
            warn=warn,
        )

    def add(self, record: Mapping[str, Any], heatmaps: np.ndarray | None, layers: Sequence[str] = ()) -> None:
        """Remember a probe and show it.

        Args:
            record: The line for `history.jsonl`.
            heatmaps: `(images, grid_h, grid_w)`; None for a probe that failed.
            layers: Module path of each attention layer.
        """
        line = {**record, "segment": self._segment}
        self._at = record["step"]
        if heatmaps is not None:
            line["drift"] = self._guarded("the heatmap drift", lambda: self.drift.compare(heatmaps))
            self._describe_model(line, heatmaps, layers)
        self._append(line, heatmaps)
        if heatmaps is None:
            return
        self._count += 1
        media = self._guarded("drawing", lambda: panels.pictures(self.history, heatmaps, self.images))
        if media:
            self._save_overlays(media["heatmaps"])
        shown = self._publication(media)
        self._to_loggers(lambda adapter: self._show(adapter, shown))
        self._opened = True

    def alert(self, title: str, text: str) -> None:
        """Send one alert to every logger that knows alerts."""
        self._to_loggers(lambda adapter: adapter.alert(title, text))

    def close(
        self, *, metrics: Mapping[str, float], counts: tuple[int, int], seconds: tuple[float, float]
    ) -> list[str]:
        """Write the report and hand the loggers what belongs to the end of a run.

        Args:
            metrics: What the trainer logged last.
            counts: Probes taken, and failed among them.
            seconds: Time spent in probes, and in the whole fit.

        Returns:
            The run in a few lines for the console.
        """
        report = None
        if self._on_disk and self.history.records:
            report = self._guarded("the report", lambda: write_report(self.history.dir))
        if self._opened:
            names = ("step", "layer", "head", "importance", "share", "flagged")
            ending = Ending(
                self.history.records[-1]["step"],
                [[row[name] for name in names] for row in self.history.rows()],
                report,
                self.history.dir if self._on_disk else None,
                self.summary(),
            )
            self._to_loggers(lambda adapter: adapter.close(ending))
        records, layers = self.history.records, self.history.layers
        lines = closing_lines(
            metrics=metrics,
            probes=counts[0],
            failed=counts[1],
            probe_seconds=seconds[0],
            run_seconds=seconds[1],
            flagged=[(layers[layer], head) for layer, head in (records[-1]["flagged"] if records else [])],
            folder=self.history.dir if self._on_disk else None,
            wandb_offline=self._guarded("WandbLogger", lambda: offline_run(self.loggers)),
        )
        return lines + event_table(self.history.events)

    def summary(self) -> dict[str, Any]:
        """Summary keys of the run: heads flagged now and ever, when the first collapsed, which is weakest."""
        history = self.history
        good = [record for record in history.records if record.get("importance")]
        collapses = [event for event in history.events if event["kind"] == "collapsed"]
        found: dict[str, Any] = {
            "gmar/collapsed_final": len(good[-1]["flagged"]) if good else 0,
            "gmar/collapsed_ever": len({(event["layer"], event["head"]) for event in collapses}),
        }
        if collapses:
            found["gmar/first_collapse_step"] = collapses[0]["step"]
        if good:
            shares = history.shares(good[-1]["step"])
            if not np.isfinite(shares).any():
                return found
            layer, head = np.unravel_index(np.nanargmin(shares), shares.shape)
            found["gmar/worst_head"] = f"{history.layers[layer]} head {head}"
        return found

    def _describe_model(self, line: Mapping[str, Any], heatmaps: np.ndarray, layers: Sequence[str]) -> None:
        if self.history.layers:
            return
        heads = np.isfinite(line["shares"]).sum(-1).tolist()
        found = {"layers": list(layers), "heads": heads, "grid": list(heatmaps.shape[1:])}
        self.history.run.update(found)
        if self._on_disk:
            self._guarded("the record", lambda: self.history.update_run(found))

    def _append(self, line: dict[str, Any], heatmaps: np.ndarray | None) -> None:
        if self._on_disk:
            self._guarded("the record", lambda: self.history.append(line, heatmaps))
        if not self.history.records or self.history.records[-1]["global_step"] != line["global_step"]:
            # The disk would not take it: keep the run's history going in memory.
            self.history.remember(line)

    def _save_overlays(self, overlays: Sequence[np.ndarray]) -> None:
        if self._on_disk and len(overlays):
            last = self.history.records[-1]
            self._guarded(
                "the record",
                lambda: self.history.save_overlays(last["step"], last["global_step"], overlays),
            )

    def _publication(self, media: Mapping[str, Any] | None) -> Publication:
        record = self.history.records[-1]
        numbers = panels.scalars(record, self.history.heads, self._per_head)
        hidden = panels.hidden_names(self.history.heads) if self._per_head else frozenset[str]()
        events = record.get("events") or []
        if media is None or (self._count - 1) % self._media_every:
            return Publication(record["step"], numbers, hidden, events=events)
        return Publication(
            record["step"],
            numbers,
            hidden,
            captions=panels.captions(record, self._labels, self._names),
            inputs=() if self._opened else self.images,
            photographs=self.images,
            events=events,
            image_rows=panels.image_rows(record, self._labels, self._names)[: len(self.images)],
            **media,
        )

    def _show(self, adapter: Adapter, shown: Publication) -> None:
        if not self._opened:
            adapter.open(self._settings, list(shown.scalars), shown.hidden)
            name = type(adapter.logger).__name__
            if not adapter.pictures and self._on_disk and name != "DummyLogger":
                self._say_once(
                    f"GMARCallback: {name} takes numbers only; the pictures are in {self.history.dir}"
                )
        adapter.publish(shown)

    def _to_loggers(self, action: Callable[[Adapter], None]) -> None:
        """Do it with every logger; one that fails is said once, and the others go on."""
        for adapter in self._adapters:
            self._guarded(type(adapter.logger).__name__, lambda adapter=adapter: action(adapter))

    def _recorded_maps(self) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Maps of the first and the last probe of this segment, when a record is continued."""
        steps = [
            r["step"] for r in self.history.records if r.get("maps") and r.get("segment", 0) == self._segment
        ]
        if not steps:
            return None, None
        ends = (steps[0], steps[-1])
        first, last = (self._guarded("the record", lambda at=at: self.history.heatmaps(at)) for at in ends)
        return first, last

    def _guarded(self, sink: str, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except Exception as error:
            self._say_once(
                f"GMARCallback: {sink} failed at step {self._at} and is left out ({type(error).__name__}: {error})",
                sink,
            )
            return None

    def _say_once(self, sentence: str, key: str | None = None) -> None:
        if (key or sentence) not in self._warned:
            self._warned.add(key or sentence)
            self._warn(sentence)


def _opened(folder: Path, run: Mapping[str, Any], resume_at: int | None) -> tuple[History, int]:
    """The record in `folder` and the segment to go on in."""
    if resume_at is None or not (folder / "run.json").is_file():
        return History.create(folder, run), 0
    history = History.load(folder)
    history.rewind(resume_at)
    last = history.run["segments"][-1]
    if last["fingerprint"] == run["fingerprint"]:
        return history, last["segment"]
    changes = {name: run[name] for name in ("labels", "num_images", "num_heatmaps")}
    return history, history.add_segment(run["fingerprint"], resume_at, changes)
