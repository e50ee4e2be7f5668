"""How long before the loss the detector speaks: `python -m tests.benchmarks.lead_time FOLDER [--stored]`.

Small ViTs learn scikit-learn's digits while training is made unstable, and as many kinds of them in health. The
events of the detector are set beside Lightning's `SpikeDetection` at its defaults (a value at least three times
the mean of the last ten, and higher than the one before), on the loss of every step and on the global gradient
norm of every step. Time counts in probes; a probe sees the model before the steps that follow it. Runs are kept
in FOLDER. Thresholds were not chosen on these runs.
"""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from lightning.fabric.utilities.spike import SpikeDetection
from timm.models.vision_transformer import VisionTransformer
from torch.optim import Optimizer

from gmar_lightning.monitor.attention_kinds import RULES
from tests.benchmarks.training import Hooks, Recipe, Signals, digits, events_of, file_of, kept, learn

UNSTABLE = ("rate x 30", "no warm-up", "half precision", "queries and keys x 10")
SEEDS, HEALTHY_SEEDS = range(500, 512), range(700, 790)
PROBES, EVERY = 50, 4
ALARMS = {"collapsed", "layer_vanishing", "nonfinite", *(rule.kind for rule in RULES)}
SHAPES = ((2, 3, 12, 8), (4, 6, 8, 8), (3, 16, 4, 8), (3, 4, 8, 8))
HEALTHY_AS = (
    ("AdamW", 2e-3, 5),
    ("SGD", 0.05, 20),
    ("Muon", 0.01, 4),
    ("AdamW", 1e-3, 8),
)  # rate, steps between probes


@dataclass
class Trouble:
    """One way to make training unstable, from a probe on."""

    kind: str
    start: int

    def rate(self, usual: float) -> float:
        """The rate at birth: a model at initialisation does not bear what a warm-up would lead to."""
        return 10 * usual if self.kind == "no warm-up" else usual

    def before_probe(self, probe: int, model: VisionTransformer, several: list[Optimizer]) -> None:
        """The troubles that come once; they act from the steps after the probe on."""
        if probe != self.start:
            return
        if self.kind == "rate x 30":
            for group in several[0].param_groups:
                group["lr"] *= 30
        if self.kind == "queries and keys x 10":
            with torch.no_grad():
                for block in model.blocks:
                    block.attn.qkv.weight[: 2 * model.embed_dim] *= 10

    def after_step(self, probe: int, model: VisionTransformer, several: list[Optimizer]) -> None:
        """Half precision without scaling: what is kept between steps, Adam's moments too, is rounded to it."""
        if self.kind != "half precision" or probe < self.start:
            return
        state = [
            value for part in several[0].state.values() for name, value in part.items() if name != "step"
        ]
        with torch.no_grad():
            for tensor in (*model.parameters(), *state):
                tensor.copy_(tensor.half())


def unstable(kind: str, seed: int, folder: Path) -> tuple[Signals, int]:
    """A run that becomes unstable, and the probe from which."""
    start = 0 if kind == "no warm-up" else 26 + seed % 5  # once it has learned something
    trouble = Trouble(kind, start)
    recipe = Recipe(*SHAPES[seed % len(SHAPES)], rate=trouble.rate(2e-3), probes=PROBES, every=EVERY)
    hooks = Hooks(before_probe=trouble.before_probe, after_step=trouble.after_step)
    name = f"{kind} {seed}"
    return kept(folder, name, lambda: learn(recipe, seed, digits(), hooks)), start


def healthy(seed: int, folder: Path) -> Signals:
    """A short run to which nothing is done: four shapes, three optimisers, one in five with QK-norm or drop path."""
    optimizer, rate, every = HEALTHY_AS[(seed // len(SHAPES)) % len(HEALTHY_AS)]
    shape = SHAPES[seed % len(SHAPES)]
    other = seed % 5
    recipe = Recipe(*shape, optimizer, rate, other == 0, drop_path=0.1 * (other == 1), probes=24, every=every)
    return kept(folder, f"healthy {seed}", lambda: learn(recipe, seed, digits(), Hooks()))


def spikes(values: np.ndarray) -> list[float]:
    """When Lightning's rule fires on `(probes, every)`, in probes."""
    rule, times = SpikeDetection(), []
    for index, value in enumerate(torch.from_numpy(values.ravel()).float()):
        if index >= rule.warmup and rule._is_spike(value):
            times.append((index + 1) / values.shape[1])
        else:
            rule._update_stats(value)
    return times


def alarms(signals: Signals) -> dict[str, list[float]]:
    """When each of the three fires, in probes."""
    return {
        "detector": [float(event.step) for event in events_of(signals) if event.kind in ALARMS],
        "loss": spikes(signals["loss"]),
        "gradient norm": spikes(signals["gradient"]),
    }


def first(times: list[float], start: int) -> float:
    """The first alarm after the trouble began; NaN where there is none."""
    return min((time for time in times if time >= start), default=np.nan)


def leads(of_kind: list[tuple[Signals, int]]) -> str:
    """A line of the table: how often each fired, and how many probes the detector was earlier."""
    at = {name: [] for name in ("detector", "loss", "gradient norm")}
    for signals, start in of_kind:
        for name, times in alarms(signals).items():
            at[name].append(first(times, start) - start)
    fired = [f"{np.isfinite(times).sum()}/{len(times)}, {_middle(times)}" for times in at.values()]
    early = [_middle(np.subtract(at[other], at["detector"])) for other in ("loss", "gradient norm")]
    return " | ".join([*fired, *early])


def _middle(times: np.ndarray | list[float]) -> str:
    known = np.asarray(times)[np.isfinite(times)]
    return f"{np.median(known):.1f} (n {len(known)})" if len(known) else "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--stored", action="store_true", help="judge the runs in FOLDER, run nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder: Path = arguments.folder

    def wanted(name: str) -> bool:
        return not arguments.stored or file_of(folder, name).exists()

    runs: dict[str, list[tuple[Signals, int]]] = {kind: [] for kind in UNSTABLE}
    well = []
    for turn, seed in enumerate(SEEDS):
        for kind in UNSTABLE:
            if wanted(f"{kind} {seed}"):
                runs[kind].append(unstable(kind, seed, folder))
        # a part of the healthy runs at each turn, so that what is there after a while is balanced
        well += [
            healthy(other, folder)
            for other in HEALTHY_SEEDS[turn :: len(SEEDS)]
            if wanted(f"healthy {other}")
        ]
    print(
        "| trouble | accuracy | detector: fired, probes after | loss: fired, after | gradient norm: fired, after "
        "| earlier than the loss | earlier than the gradient norm |\n|---|---|---|---|---|---|---|"
    )
    for kind, of_kind in runs.items():
        if of_kind:
            accuracy = np.mean([signals["accuracy"] for signals, _ in of_kind])
            print(f"| {kind} | {accuracy:.2f} | {leads(of_kind)} |")
    if well:
        false = [{name: len(times) for name, times in alarms(signals).items()} for signals in well]
        print(
            f"\n{len(well)} healthy runs, accuracy {np.mean([s['accuracy'] for s in well]):.2f}; "
            "of 100 runs, with an alarm:"
        )
        for name in false[0]:
            print(f"  {name}: {100 * np.mean([counts[name] > 0 for counts in false]):.0f}")
        print("  events of any kind:", dict(Counter(e.kind for signals in well for e in events_of(signals))))
    for kind, of_kind in runs.items():
        said = Counter(e.kind for signals, _ in of_kind for e in events_of(signals) if e.kind in ALARMS)
        print(f"{kind}: {dict(said)}")


if __name__ == "__main__":
    main()
