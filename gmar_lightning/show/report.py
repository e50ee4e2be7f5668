"""One self-contained interactive HTML file from the records of one or several runs."""

import html
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from gmar_lightning.monitor.history import History
from gmar_lightning.show.codec import base64_of
from gmar_lightning.show.colour import HEAT
from gmar_lightning.show.report_data import embedded, fitted_run
from gmar_lightning.version import __version__

# Two megabytes for a run, three for a comparison, less what numbers may still grow by.
_LIMIT_ONE, _LIMIT_SEVERAL = 1_950_000, 2_950_000
# In the order in which they need each other.
_SCRIPTS = (
    "data",
    "canvas",
    "verdicts",
    "photographs",
    "heads",
    "card",
    "moments",
    "difference",
    "charts",
    "rasters",
    "steering",
)


def write_report(dirs: Sequence[str | Path] | str | Path, out: str | Path | None = None) -> Path:
    """Write the report of one run, or of several side by side.

    Of long runs, probes are left out evenly until the file has at most two megabytes (three for several runs);
    the page says so.

    Args:
        dirs: folder of one record, or several.
        out: the file; by default `report.html` in the first folder.

    Returns:
        Path of the file.

    Raises:
        FileNotFoundError: a folder holds no record.
        ValueError: no folder given, a record is unreadable, or one is of probes and another of training steps.
    """
    folders = [Path(dirs)] if isinstance(dirs, (str, Path)) else [Path(folder) for folder in dirs]
    if not folders:
        raise ValueError("a report needs at least one folder")
    histories = [History.load(folder) for folder in folders]
    path = Path(out) if out is not None else folders[0] / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(render_report(histories, run_names(folders)), encoding="utf-8")
    partial.replace(path)
    return path


def render_report(histories: Sequence[History], names: Sequence[str]) -> str:
    """The report as HTML text; `names` are shown for the runs."""
    folder = files("gmar_lightning.show")
    template, style = (
        folder.joinpath(f"report.{end}").read_text(encoding="utf-8") for end in ("html", "css")
    )
    scripts = [folder.joinpath("page", f"{name}.js").read_text(encoding="utf-8") for name in _SCRIPTS]
    script = '"use strict";\n(() => {\n' + "\n".join(scripts) + "})();\n"
    check_comparable(histories)
    limit = _LIMIT_ONE if len(histories) == 1 else _LIMIT_SEVERAL
    share = (limit - len(template) - len(style) - len(script)) // len(histories)
    runs = [fitted_run(history, name, share) for history, name in zip(histories, names, strict=True)]
    data = {"version": __version__, "heat": base64_of(HEAT), "runs": runs}
    fillings = {
        "title": html.escape(f"GMAR report: {', '.join(names)}"),
        "style": style,
        "data": embedded(data),
        "script": script,
    }
    # the template is split, not formatted: what a user wrote must not be taken for a placeholder
    parts = []
    for placeholder, filling in fillings.items():
        before, template = template.split("{{" + placeholder + "}}")
        parts += [before, filling]
    return "".join([*parts, template])


def check_comparable(histories: Sequence[History]) -> None:
    """Refuse to set probes beside training steps.

    Raises:
        ValueError: One record is of probes, another was read off training steps.
    """
    sources = {history.run.get("source", "probe"): history.dir for history in histories}
    if len(sources) > 1:
        raise ValueError(
            f"{sources['step']} was read off training steps and {sources['probe']} is of probes: their numbers are "
            "not comparable"
        )


def run_names(folders: Sequence[Path]) -> list[str]:
    """Shortest endings of the paths that tell the runs apart; a last part `gmar` is left out."""
    parts = [folder.resolve().parts[1:] or ("run",) for folder in folders]
    parts = [p[:-1] if p[-1] == "gmar" and len(p) > 1 else p for p in parts]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-length:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{'/'.join(p[-1:])} ({number})" for number, p in enumerate(parts, start=1)]
