"""How well failures that importance cannot see, and causes, are named: `python -m tests.benchmarks.attention FOLDER`.

Small ViTs learn scikit-learn's digits while one thing goes wrong (`attention_runs`). Limits were chosen on the
seeds of `TUNE` and on made-up series; the second table comes from the seeds of `REPORT`. Runs are kept in FOLDER.
An event is right from the probe at which its plant began; a plant is named when its event comes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from gmar_lightning.monitor.attention_kinds import RULES
from tests.benchmarks.attention_runs import ATTENTION, CAUSES, LOOKALIKES, Series, run
from tests.benchmarks.training import digits, events_of

TUNE, REPORT, PROBES = (1, 2, 3, 7, 8, 10), (13, 14, 16, 18, 19, 20), 40
EVENTS = {
    "one token": {"entropy_collapse"},
    "uniform": {"uniform_attention"},
    "logits": {"logit_growth"},
    "sink": {"attention_sink"},
    "copy": {"head_copy"},
    "rank": {"rank_collapse"},
    "constant": {"constant_values"},
}
# What a plant brings about besides: one-token attention has large logits, large logits attend to one token.
BESIDE = {
    "one token": {"logit_growth", "attention_sink"},
    "logits": {"entropy_collapse", "attention_sink"},
    "sink": {"logit_growth"},
}
CAUSE = {
    "values": "switched off by its values",
    "projection": "switched off by its output projection",
    "layer scale": "LayerScale at zero",
    "cut": "no gradient reaches the layer",
    "all values": "switched off by its values",
}
KINDS = {rule.kind for rule in RULES}


def judged(series: Series) -> tuple[int, int, int, list[int]]:
    """Plants named, plants, false events, and delays in probes after the plant acts fully."""
    expected = EVENTS.get(series.kind, set())
    allowed = expected | BESIDE.get(series.kind, set())
    places = {(layer, None if series.kind == "rank" else head) for layer, head in series.planted}
    named, false, delays = set(), 0, []
    for event in events_of(series.signals):
        if event.kind not in KINDS:
            continue
        # Tokens that became alike are alike in all layers after the plant as well.
        after = series.kind == "rank" and event.layer >= series.planted[0][0]
        if event.kind in allowed and ((event.layer, event.head) in places or after):
            if event.kind in expected and (event.layer, event.head) in places - named:
                named.add((event.layer, event.head))
                delays.append(event.step - series.start)
        else:
            false += 1
    return len(named), len(places) if expected else 0, false, delays


def cause_of(series: Series) -> str | None:
    """The first cause given at the planted place."""
    where = series.planted[0][0]
    for event in events_of(series.signals):
        if event.cause is not None and event.layer in (where, None):
            return event.cause
    return None


def report(runs: Iterable[Series]) -> None:
    """Print the tables."""
    runs = list(runs)
    print(
        "| planted | named | precision | delay median / max | false events | runs |\n|---|---|---|---|---|---|"
    )
    for kind in (*ATTENTION, *LOOKALIKES):
        parts = [judged(series) for series in runs if series.kind == kind]
        if not parts:
            continue
        named, planted, false = (sum(part[i] for part in parts) for i in range(3))
        delays = [delay for part in parts for delay in part[3]]
        late = f"{np.median(delays):.0f} / {max(delays)}" if delays else "-"
        share = f"{named / (named + false):.2f}" if named + false else "-"
        print(f"| {kind} | {named}/{planted} | {share} | {late} | {false} | {len(parts)} |")
    print("\n| planted cause | named rightly | said instead |\n|---|---|---|")
    for kind in CAUSE:
        said = [cause_of(series) for series in runs if series.kind == kind]
        wrong = sorted({str(cause) for cause in said if cause != CAUSE[kind]})
        print(
            f"| {kind} | {sum(cause == CAUSE[kind] for cause in said)}/{len(said)} | {', '.join(wrong) or '-'} |"
        )


def main() -> None:
    torch.set_num_threads(1)
    folder, data = Path(sys.argv[1]), digits()
    folder.mkdir(parents=True, exist_ok=True)
    for title, seeds in (("tuning", TUNE), ("reporting", REPORT)):
        print(f"\nSeeds for {title}: {seeds}\n")
        report(
            run(kind, seed, PROBES, data, folder)
            for seed in seeds
            for kind in (*LOOKALIKES, *ATTENTION, *CAUSES)
        )


if __name__ == "__main__":
    main()
