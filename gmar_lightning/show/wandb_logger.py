"""Weights & Biases: media, tables that grow, artefacts, alerts, and a summary that makes runs sortable."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gmar_lightning.show import keys
from gmar_lightning.show.publication import Adapter, Ending, Publication

# W&B truncates a list of images here, silently.
_MOST_IMAGES = 108
_EVENT_COLUMNS = (
    *("step", "kind", "layer", "head", "layer_name", "value", "reference", "since_step"),
    *("cause", "evidence", "message"),
)
_IMAGE_COLUMNS = (
    *("step", "image", "picture", "map", "label", "prediction", "probability", "score"),
    *("drift", "drift_from_first"),
)
_HEAD_COLUMNS = ("step", "layer", "head", "importance", "share", "flagged")


class WandbAdapter(Adapter):
    """Hands probes to a `WandbLogger`; all of a probe shares one row, on the trainer's step.

    Two tables grow with the run, each logged as increments of one table: `gmar/events`, a row per event, and
    `gmar/images`, a row per drawn image.
    """

    pictures = True

    def __init__(self, logger: Any) -> None:
        super().__init__(logger)
        self._tables: dict[str, Any] = {}
        self._defined: set[str] = set()

    def open(self, settings: Mapping[str, Any], scalars: Sequence[str], hidden: frozenset[str]) -> None:
        """Define every key and put the settings into `config.gmar`."""
        run = self.logger.experiment
        run.config.update({self.key("gmar"): dict(settings)}, allow_val_change=True)
        # Every key by its exact name: overlapping globs are resolved at random, and a run that existed before
        # the logger has no step metric at all.
        run.define_metric(keys.STEP)
        media = keys.of_kind("pictures", "picture", "histogram", "growing table")
        for name in (*scalars, *map(self.key, media)):
            if name in hidden:
                run.define_metric(self.prefixed(name), step_metric=keys.STEP, hidden=True, summary="none")
            else:
                self._define(name)

    def _define(self, name: str) -> None:
        if name not in self._defined:
            self._defined.add(name)
            self.logger.experiment.define_metric(self.prefixed(name), step_metric=keys.STEP)

    def publish(self, shown: Publication) -> None:
        """Hand over one probe: a single `log_metrics` call, so that all of it shares one row."""
        grown = self._grown_tables(shown)
        for name in (*shown.grids, *map(self.key, shown.others)):
            self._define(name)  # which heads will have a picture is not known before they are flagged
        self.logger.log_metrics(
            {**shown.finite, **_media(shown, self.key(keys.IMPORTANCE_HISTOGRAM)), **grown}, step=shown.step
        )
        for table in grown.values():
            _forget_rows(table)

    def alert(self, title: str, text: str) -> None:
        """One alert; the title stays the same because the server groups alerts by it."""
        self.logger.experiment.alert(title=title, text=text, level="WARN")

    def close(self, ending: Ending) -> None:
        """The table of all heads over all probes, the report, the summary, and both as versioned artefacts."""
        import wandb

        table = wandb.Table(columns=list(_HEAD_COLUMNS), data=[list(row) for row in ending.rows])
        last: dict[str, Any] = {self.key(keys.HEAD_TABLE): table}
        if ending.report is not None:
            last[self.key(keys.REPORT)] = wandb.Html(ending.report.read_text(encoding="utf-8"), inject=False)
        self.logger.log_metrics(last, step=ending.step)
        run = self.logger.experiment
        run.summary.update({self.prefixed(key): value for key, value in ending.summary.items()})
        for kind, path in (("report", ending.report), ("record", ending.record)):
            if path is None:
                continue
            # One name per run: a resumed run adds a version.
            artefact = wandb.Artifact(
                self.key(f"gmar-{kind}-{run.id}").replace("/", "-"), type=f"gmar-{kind}"
            )
            artefact.add_dir(str(path)) if path.is_dir() else artefact.add_file(str(path))
            run.log_artifact(artefact)

    def _grown_tables(self, shown: Publication) -> dict[str, Any]:
        """The tables that have new rows, by key."""
        grown = {}
        if shown.events:
            events = grown[self.key(keys.EVENTS)] = self._table(self.key(keys.EVENTS), _EVENT_COLUMNS)
            for event in shown.events:
                events.add_data(*(_cell(event.get(name)) for name in _EVENT_COLUMNS))
        if shown.image_rows and len(shown.heatmaps):
            images = grown[self.key(keys.IMAGES)] = self._table(self.key(keys.IMAGES), _IMAGE_COLUMNS)
            for row in _image_rows(shown):
                images.add_data(*row)
        return grown

    def _table(self, key: str, columns: Sequence[str]) -> Any:
        import wandb

        if key not in self._tables:
            # Mixed types are allowed: a layer's event has no head, an unlabelled image no label.
            self._tables[key] = wandb.Table(
                columns=list(columns), log_mode="INCREMENTAL", allow_mixed_types=True
            )
        return self._tables[key]


def offline_run(loggers: Sequence[Any]) -> Path | None:
    """Folder of the first offline W&B run among the loggers, relative to the working directory."""
    for logger in loggers:
        known = any(kind.__name__ == "WandbLogger" for kind in type(logger).__mro__)
        if known and getattr(logger.experiment, "offline", False):
            return Path(os.path.relpath(logger.experiment.settings.sync_dir))
    return None


def _media(shown: Publication, histogram: str) -> dict[str, Any]:
    import wandb

    media: dict[str, Any] = {
        name: [
            wandb.Image(image, caption=caption, file_type="jpg")
            for image, caption in zip(images[:_MOST_IMAGES], shown.captions, strict=False)
        ]
        for name, images in shown.lists.items()
    }
    media.update({name: wandb.Image(picture, file_type="png") for name, picture in shown.grids.items()})
    finite = shown.importance[np.isfinite(shown.importance)]
    if finite.size:
        # A fixed range, in fair shares, so that the rows of all steps line up.
        counts = np.histogram(np.clip(finite, 0, 4), bins=32, range=(0, 4))
        media[histogram] = wandb.Histogram(np_histogram=counts)
    return media


def _image_rows(shown: Publication) -> list[list[Any]]:
    import wandb

    rows = []
    for row, photograph, heat in zip(shown.image_rows, shown.photographs, shown.heatmaps, strict=False):
        pictures = {
            "picture": wandb.Image(photograph, file_type="jpg"),
            "map": wandb.Image(heat, file_type="jpg"),
        }
        known = {"step": shown.step, **row, **pictures}
        rows.append([_cell(known.get(name)) for name in _IMAGE_COLUMNS])
    return rows


def _forget_rows(table: Any) -> None:
    # An increment holds new rows only, and those before are never read again. Their pictures would fill the
    # memory: two per image and probe, for the whole run.
    for row in table.data:
        row[:] = [None] * len(row)


def _cell(value: Any) -> Any:
    missing = isinstance(value, float) and not np.isfinite(value)
    return None if missing else value
