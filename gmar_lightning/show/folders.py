"""Where the record of a run lies, whatever folder of the run was named."""

from pathlib import Path


def record_folder(folder: Path) -> Path:
    """The folder itself, or the `gmar` folder in it when that holds the record."""
    inner = folder / "gmar"
    return inner if not (folder / "run.json").exists() and (inner / "run.json").exists() else folder
