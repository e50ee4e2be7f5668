"""What the console says when a run ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gmar_lightning.monitor.record import Source
from gmar_lightning.show.terminal import plain


def opening_line(run: Mapping[str, Any]) -> str:
    """What is watched: layers and heads, what is explained, the grid of the maps; from `run.json`."""
    heads = sorted(set(run["heads"]))
    of = f"{heads[0]}" if len(heads) == 1 else f"{heads[0]} to {heads[-1]}"
    maps = " x ".join(map(str, run["grid"])) if run.get("grid") else "none"
    doubt = " (nothing confirms that these are class scores: name a part with its head with module=)"
    explained = str(run.get("explained") or "")
    return (
        f"GMAR  {len(run['layers'])} layers of {of} heads, {explained}, maps {maps}"
        f"{doubt if explained.endswith('?') else ''}"
    )


def closing_lines(
    *,
    metrics: Mapping[str, float],
    probes: int,
    failed: int,
    probe_seconds: float,
    run_seconds: float,
    flagged: Sequence[tuple[str, int]],
    folder: Path | None,
    wandb_offline: Path | None,
    source: Source = "probe",
) -> list[str]:
    """The run in a few lines: accuracy, probes and their cost, flags, where to look.

    Args:
        metrics: What the trainer logged last.
        probes: Probes taken.
        failed: Probes among them that failed.
        probe_seconds: Time spent in them, pictures and logging included.
        run_seconds: Time of the whole fit.
        flagged: Layer name and head of each head flagged now.
        folder: The local record.
        wandb_offline: Folder of an offline W&B run, if there is one.
        source: Where the numbers come from.

    Returns:
        The lines.
    """
    accuracies = {name: value for name, value in metrics.items() if "acc" in name.lower()}
    lines = ["GMAR"]
    if accuracies:
        lines.append("  accuracy   " + ", ".join(f"{name} {value:.4f}" for name, value in accuracies.items()))
    share = 100 * probe_seconds / run_seconds if run_seconds > 0 else 0.0
    missing = f", {failed} failed" if failed else ""
    if source == "step":
        lines.append(f"  steps read {probes}{missing}")
    else:
        lines.append(
            f"  probes     {probes}{missing}: {probe_seconds:.1f} s, {share:.1f} % of {run_seconds:.0f} s"
        )
    heads = ", ".join(f"{layer} head {head}" for layer, head in flagged[:6]) or "none"
    more = f" and {len(flagged) - 6} more" if len(flagged) > 6 else ""
    lines.append(f"  flagged    {heads}{more}")
    if folder is not None:
        lines.append(f"  look at    {folder / 'report.html'} (and {folder}/heatmaps)")
    if wandb_offline is not None:
        lines.append(f"  W&B        wandb leet {wandb_offline}   or   wandb sync {wandb_offline}")
    return [plain(line) for line in lines]


def alarm_text(events: Sequence[Any], most: int = 8) -> str:
    """All alarms of one probe in one text: what happened to which head, and what to try.

    Args:
        events: The `HeadEvent`s.
        most: Say at most so many in full.
    """
    said = [event.message for event in events[:most]]
    if len(events) > most:
        said.append(f"And {len(events) - most} more.")
    said.append("Try a lower learning rate, a longer warm-up or less weight decay on attention.")
    return "\n".join(said)


def event_table(events: Sequence[Mapping[str, Any]], most: int = 40) -> list[str]:
    """All events of a run as lines of a table, the newest `most` of them."""
    if not events:
        return []
    lines = [f"  {'step':>8}  {'kind':<16}  what happened"]
    for event in events[-most:]:
        lines.append(f"  {event['step']:>8}  {event['kind']:<16}  {event['message']}")
    if len(events) > most:
        lines.insert(1, f"  ({len(events) - most} earlier ones are in the record)")
    return [plain(line) for line in lines]
