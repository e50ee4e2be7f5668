"""`gmar watch RUN`: a running job in the terminal, from nothing but its record."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from gmar_lightning.monitor.history import History
from gmar_lightning.monitor.record import ProbeRecord, effective_heads
from gmar_lightning.show.folders import record_folder
from gmar_lightning.show.terminal import coloured, has_colours, plain, raster


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `gmar watch`."""
    parser.add_argument(
        "run", type=Path, metavar="RUN", help="folder of a record, or of a run with a gmar folder"
    )
    parser.add_argument(
        "--interval", type=float, default=2.0, metavar="SECONDS", help="how often to look (default 2)"
    )
    parser.add_argument("--once", action="store_true", help="say what there is and stop")


def run(arguments: argparse.Namespace) -> int:
    """Follow the run until its report is written or somebody presses Ctrl-C.

    Returns:
        Exit code: 0, or 2 when the folder holds no usable record.
    """
    folder = record_folder(arguments.run)
    try:
        history = History.load(folder)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    screen = Screen(history)
    try:
        for news in follow(folder, history.heads, arguments.interval, arguments.once):
            screen.show(news)
    except KeyboardInterrupt:
        print()
    return 0


def follow(
    folder: Path, heads: Sequence[int], interval: float, once: bool = False
) -> Iterator[list[ProbeRecord] | None]:
    """New probes as they are written, a list at a time; None when the run went back to a checkpoint.

    Args:
        folder: The record.
        heads: Heads of each layer, as far as they are known.
        interval: Seconds between looks.
        once: Only what there is now.
    """
    path, offset = folder / "history.jsonl", 0
    while True:
        size = path.stat().st_size if path.is_file() else 0
        if size < offset:
            # A resumed run drops the probes after its checkpoint and takes them again.
            offset = 0
            yield None
        records, offset = _complete_lines(path, offset, heads) if size > offset else ([], offset)
        if records:
            yield records
        elif once or _has_ended(folder):
            return
        else:
            time.sleep(interval)


class Screen:
    """Prints probes: a line each, events beneath, and on a terminal one raster that is drawn anew."""

    def __init__(self, history: History) -> None:
        self._layers = history.layers
        self._drawn = 0
        if history.run.get("source") == "step":
            print("  read off training steps: the loss on training batches, not comparable with probes")
        print(
            coloured(
                f"  {'step':>8} {'epoch':>5} {'flagged':>7} {'effective':>9} {'weakest':>7} {'drift':>6}",
                "dim",
            )
        )

    def show(self, news: list[ProbeRecord] | None) -> None:
        """New probes, or None for a run that went back."""
        self._erase()
        if news is None:
            print(coloured("  the run was resumed: its probes are shown again", "yellow"))
            return
        for record in news:
            print(probe_line(record))
            for event in record.events:
                bad = event.kind in ("collapsed", "layer_vanishing", "nonfinite") or "collapse" in event.kind
                print(
                    coloured(plain(f"           {event.kind}: {event.message}"), "red" if bad else "yellow")
                )
        last = next((record for record in reversed(news) if record.shares is not None), None)
        if last is not None and last.shares is not None:
            lines = raster(last.shares, last.flagged)
            print("\n".join(lines), flush=True)
            self._drawn = len(lines) if has_colours(sys.stdout) else 0

    def _erase(self) -> None:
        if self._drawn:
            print(f"\033[{self._drawn}A\033[J", end="")
            self._drawn = 0


def probe_line(record: ProbeRecord) -> str:
    """One probe in one line: where, flags, effective heads, weakest head in fair shares, drift, metrics."""
    where = f"  {record.step:>8} {record.epoch:>5}"
    if record.shares is None:
        return coloured(plain(f"{where} failed: {record.failure}"), "red")
    shares = record.shares
    relative = shares * np.isfinite(shares).sum(1, keepdims=True)
    drift = np.asarray((record.drift or {}).get("rank_correlation_previous", ()), dtype=float)
    moved = f"{1 - np.nanmean(drift):6.2f}" if np.isfinite(drift).any() else "     -"
    flags = f"{len(record.flagged):>7}"
    metrics = "  ".join(f"{plain(name)} {value:.4g}" for name, value in list(record.metrics.items())[:4])
    return (
        f"{where} {coloured(flags, 'red') if record.flagged else flags} {np.nanmean(effective_heads(shares)):9.2f} "
        f"{np.nanmin(relative):7.2f} {moved}  {metrics}"
    ).rstrip()


def _complete_lines(path: Path, offset: int, heads: Sequence[int]) -> tuple[list[ProbeRecord], int]:
    """Probes after `offset`, and where the last complete line ends; a line in the making is left for later."""
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read()
    complete = data[: data.rfind(b"\n") + 1]
    records = []
    for line in complete.splitlines():
        try:
            records.append(ProbeRecord.from_json(json.loads(line), heads))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            print(f"{path}: a damaged line is left out", file=sys.stderr)
    return records, offset + len(complete)


def _has_ended(folder: Path) -> bool:
    # The report is written once the last probe is in the record.
    report, lines = folder / "report.html", folder / "history.jsonl"
    return report.is_file() and lines.is_file() and report.stat().st_mtime >= lines.stat().st_mtime
