"""How well collapse is detected in real training runs: `python -m tests.benchmarks.collapse FOLDER [--stored]`.

Small ViTs learn scikit-learn's digits under several recipes (optimiser, depth, heads, QK-norm, stochastic depth,
length) while a gate on a head's output or value path kills it, or only seems to. The rule's defaults were chosen
on other seeds and on made-up series; the thresholds of the baselines are chosen here on `TUNING_SEEDS`; every
number printed comes from `REPORT_SEEDS`. A flag counts as true from the probe at which the gate of its head has
passed a half. Runs are kept in FOLDER; `--stored` judges those and runs nothing.
"""

from __future__ import annotations

import argparse
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from tests.benchmarks.collapse_runs import Run, train
from tests.benchmarks.training import RECIPES, digits, events_of, file_of

TUNING_SEEDS, REPORT_SEEDS = (0, 3), (201, 202, 203)
TUNING_KINDS = ("healthy", "slow", "several", "born dead", "dip")
DYING = ("abrupt", "several", "slow", "all but one", "temporary", "fast")
LOOKALIKES = ("healthy", "exploding", "dip", "born dead", "whole layer", "waking", "partial")

Flags = dict[tuple[int, int], int]
Method = Callable[[np.ndarray], Flags]


def shipped(run: Run) -> Flags:
    flags: Flags = {}
    for event in events_of(run.signals):
        if event.kind == "collapsed":
            flags.setdefault((event.layer, event.head), event.step)
    return flags


def _first(alarm: np.ndarray) -> Flags:
    """First probe of alarm for each head, ``alarm`` ``(probes, layers, heads)``."""
    return {(int(i), int(j)): int(alarm[:, i, j].argmax()) for i, j in np.argwhere(alarm.any(axis=0))}


def _relative(importance: np.ndarray) -> np.ndarray:
    share = importance / importance.sum(-1, keepdims=True)
    return np.maximum(share * importance.shape[-1], 1e-6)


def absolute(importance: np.ndarray, limit: float) -> Flags:
    """A share below a fixed part of a fair one, three probes running, after five probes."""
    low = _relative(importance) < limit
    low[:5] = False
    low[2:] &= low[1:-1] & low[:-2]
    low[:2] = False
    return _first(low)


def page_hinkley(importance: np.ndarray, slack: float, limit: float) -> Flags:
    """Page-Hinkley test for a fall of the log share."""
    log = np.log(_relative(importance))
    mean = log.cumsum(0) / np.arange(1, len(log) + 1)[:, None, None]
    total = (log - mean + slack).cumsum(0)
    alarm = np.maximum.accumulate(total, axis=0) - total > limit
    alarm[:5] = False
    return _first(alarm)


def cusum(importance: np.ndarray, slack: float, limit: float) -> Flags:
    """One-sided CUSUM of the log share, standardised on probes 2 to 9."""
    log = np.log(_relative(importance))
    scale = np.maximum(log[2:10].std(0), 0.05)
    score = (log - log[2:10].mean(0)) / scale
    low, alarm = np.zeros(log.shape[1:]), np.zeros(log.shape, dtype=bool)
    for probe in range(10, len(log)):
        low = np.maximum(0.0, low - score[probe] - slack)
        alarm[probe] = low > limit
    return _first(alarm)


CANDIDATES: dict[str, list[tuple[str, Method]]] = {
    "absolute share": [
        (f"limit {a}", lambda x, a=a: absolute(x, a)) for a in (0.03, 0.05, 0.1, 0.15, 0.2, 0.3)
    ],
    "Page-Hinkley": [
        (f"slack {a}, limit {b}", lambda x, a=a, b=b: page_hinkley(x, a, b))
        for a, b in itertools.product((0.02, 0.1, 0.3), (1.5, 3.0, 6.0, 12.0))
    ],
    "CUSUM": [
        (f"slack {a}, limit {b}", lambda x, a=a, b=b: cusum(x, a, b))
        for a, b in itertools.product((0.5, 2.0, 5.0), (10.0, 30.0, 100.0, 300.0))
    ],
}


def count(runs: Iterable[Run], method: Callable[[Run], Flags]) -> dict[str, np.ndarray | int]:
    """True and false flags, planted deaths, and delays in probes."""
    true = false = planted = 0
    delays = []
    for run in runs:
        # a layer that dies as a whole is to be named, its heads are not to be blamed
        dead = {} if run.kind == "whole layer" else run.dead
        planted += len(dead)
        for at, probe in method(run).items():
            if run.kind == "partial" and at in run.what.heads:
                continue  # neither right nor wrong
            if at in dead and probe >= int(np.argmax(run.what.gate <= 0.5)):
                true += 1
                delays.append(probe - dead[at])
            else:
                false += 1
    return {"true": true, "false": false, "planted": planted, "delays": np.array(delays)}


def line(name: str, runs: Sequence[Run], method: Callable[[Run], Flags]) -> str:
    """A row of the table."""
    found = count(runs, method)
    true, false, planted, delays = (found[key] for key in ("true", "false", "planted", "delays"))
    precision = f"{true / (true + false):.3f}" if true + false else "-"
    recall = f"{true / planted:.3f} ({true} of {planted})" if planted else "-"
    late = "{:.0f} / {:.0f}".format(*np.percentile(delays, [50, 90])) if len(delays) else "-"
    return f"| {name} | {len(runs)} | {precision} | {recall} | {late} | {false} |"


def tuned(runs: list[Run]) -> dict[str, tuple[str, Method]]:
    """The candidate of each baseline with the best F1 on the tuning runs."""

    def quality(candidate: tuple[str, Method]) -> float:
        found = count(runs, lambda run: candidate[1](run.signals["importance"]))
        return 2 * found["true"] / max(found["true"] + found["false"] + found["planted"], 1)

    return {name: max(candidates, key=quality) for name, candidates in CANDIDATES.items()}


def named_rightly(run: Run) -> tuple[int, int]:
    """How many of the look-alike's expected events came, and how many were expected."""
    found = {(event.kind, event.layer, event.head) for event in events_of(run.signals)}
    planted = run.what.heads
    expected = {
        "born dead": [("dormant", *at) for at in planted],
        "waking": [(kind, *at) for at in planted for kind in ("dormant", "woke")],
        "whole layer": [("layer_vanishing", at[0], None) for at in planted[:1]],
        "temporary": [(kind, *at) for at in planted for kind in ("collapsed", "recovered")],
    }.get(run.kind, [])
    return sum(event in found for event in expected), len(expected)


def collected(
    seeds: Sequence[int], recipes: Sequence[str], kinds: Sequence[str], folder: Path, stored: bool
) -> list[Run]:
    """The runs, seed by seed, so that those that are there after a while are balanced."""
    data, runs = digits(), []
    for seed, name, kind in itertools.product(seeds, recipes, kinds):
        if not stored or file_of(folder, f"{name} {kind} {seed}").exists():
            runs.append(train(kind, name, seed, data, folder))
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--stored", action="store_true", help="judge the runs in FOLDER, run nothing")
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES), choices=RECIPES)
    parser.add_argument("--seeds", nargs="*", type=int, default=list(REPORT_SEEDS))
    parser.add_argument("--kinds", nargs="*", default=[*DYING, *LOOKALIKES])
    given = parser.parse_args()
    torch.set_num_threads(1)
    plain = next(iter(RECIPES))
    tuning = collected(TUNING_SEEDS, [plain], TUNING_KINDS, given.folder, given.stored)
    runs = collected(given.seeds, given.recipes, given.kinds, given.folder, given.stored)
    header = (
        "| {} | runs | precision | recall | delay in probes, median / p90 | false flags |\n"
        + "|---" * 6
        + "|"
    )
    print(
        f"Tuning seeds {TUNING_SEEDS} ({len(tuning)} runs), reporting seeds {sorted({r.seed for r in runs})}\n"
    )
    print(header.format("detector"))
    print(line("shipped", runs, shipped))
    for name, (setting, method) in (tuned(tuning) if tuning else {}).items():
        of_signals = lambda run, method=method: method(run.signals["importance"])  # noqa: E731
        print(line(f"{name}, {setting}", runs, of_signals))
    print("\n" + header.format("recipe, shipped detector"))
    for name in given.recipes:
        of_recipe = [run for run in runs if run.recipe == name]
        accuracy = np.mean([run.signals["accuracy"] for run in of_recipe]) if of_recipe else np.nan
        print(line(f"{name} (accuracy {accuracy:.2f})", of_recipe, shipped))
    print("\n" + header.format("kind, shipped detector"))
    for kind in given.kinds:
        print(line(kind, [run for run in runs if run.kind == kind], shipped))
    print("\nLook-alikes, named rightly of expected, and every event but `collapsed`:")
    for kind in given.kinds:
        of_kind = [run for run in runs if run.kind == kind]
        right, expected = np.sum([(0, 0), *map(named_rightly, of_kind)], axis=0)
        others = Counter(e.kind for run in of_kind for e in events_of(run.signals) if e.kind != "collapsed")
        print(f"  {kind}: {right} of {expected}; {dict(others)}")


if __name__ == "__main__":
    main()
