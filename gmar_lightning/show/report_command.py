"""`gmar report`: verdicts and the comparison for people, JSON for programs, an exit code for both."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from gmar_lightning.monitor.events import EventKind
from gmar_lightning.monitor.history import History
from gmar_lightning.show.compare import compare
from gmar_lightning.show.folders import record_folder
from gmar_lightning.show.report import run_names, write_report
from gmar_lightning.show.run_json import SCHEMA, describe
from gmar_lightning.show.terminal import coloured, progress
from gmar_lightning.show.verdict import FINDINGS, judge


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `gmar report`."""
    parser.add_argument(
        "dirs", nargs="+", type=Path, metavar="RUN", help="folder of a record, or of a run with a gmar folder"
    )
    parser.add_argument("-o", "--out", type=Path, help="the page; default: report.html in the first folder")
    parser.add_argument(
        "--json", action="store_true", help="print JSON instead (schema: docs/report.schema.json)"
    )
    parser.add_argument(
        "--around", type=int, metavar="STEP", help="with --json: also the probes next to this step"
    )
    parser.add_argument(
        "--window", type=int, default=3, metavar="K", help="so many before and after it (default 3)"
    )
    parser.add_argument(
        "--fail-on",
        action="append",
        default=[],
        type=kinds_of,
        metavar="KIND[,KIND...]",
        help="exit with 1 if a run has such a finding, or had such an event; a first word is enough (entropy). "
        f"Findings: {', '.join(FINDINGS)}. Events: {', '.join(get_args(EventKind))}",
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the verdicts and the comparison, or JSON, and write the page.

    Returns:
        Exit code: 0; 1 when a run has what `--fail-on` names; 2 when a folder holds no usable record, the page
        cannot be written, or the arguments do not fit.
    """
    folders = [record_folder(folder) for folder in arguments.dirs]
    try:
        wanted = set[str]().union(*arguments.fail_on)
        if arguments.window < 0:
            raise ValueError(f"--window must not be negative, got {arguments.window}")
        histories = [History.load(folder) for folder in progress(folders, len(folders), "reading records")]
        path = write_report(folders, arguments.out)
        names = run_names(folders)
        if arguments.json:
            print(_as_json(histories, names, path, arguments))
        else:
            print(compare(histories, names))
            print(f"\nReport: {path}")
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    failed = sorted({kind for history in histories for kind in wanted & kinds_in(history)})
    if failed:
        print(coloured(f"--fail-on: {', '.join(failed)}", "red", sys.stderr), file=sys.stderr)
    return 1 if failed else 0


def kinds_of(words: str) -> set[str]:
    """The findings and events that the words of `--fail-on` name, separated by commas.

    Raises:
        argparse.ArgumentTypeError: A word names nothing, so that a typing error cannot open the gate.
    """
    known = dict.fromkeys((*FINDINGS, *get_args(EventKind)))
    kinds: set[str] = set()
    for word in (part.strip() for part in words.split(",")):
        meant = {word} & set(known) or {kind for kind in known if kind.split("_")[0] == word}
        if not meant:
            raise argparse.ArgumentTypeError(
                f"{word!r} is no finding and no event; known: {', '.join(known)}"
            )
        kinds |= meant
    return kinds


def kinds_in(history: History) -> set[str]:
    """What a run has: findings of its verdict, and kinds of events that happened at any probe."""
    return {finding.kind for finding in judge(history).findings} | {event["kind"] for event in history.events}


def _as_json(
    histories: Sequence[History], names: Sequence[str], path: Path, arguments: argparse.Namespace
) -> str:
    runs = [
        describe(history, name, arguments.around, arguments.window)
        for history, name in zip(histories, names, strict=True)
    ]
    for described in runs:
        described["paths"]["report"] = str(path.resolve())
    content: dict[str, Any] = runs[0] if len(runs) == 1 else {"schema": SCHEMA, "runs": runs}
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
