"""Fine-tunes of a pretrained model, in health and with heads switched off on purpose.

    python -m tests.benchmarks.fine_tunes --model vit_small_patch14_dinov2.lvd142m --weights FILE --images DIR \
        --size 56 --runs FOLDER [--stored]

Arguments as for `tests.benchmarks.faithfulness`; the model has a fitted linear head before it is tuned as a whole.
Every run draws its own layer, head, probe images and order of batches from its seed; none was used to choose a
threshold. Runs are kept in FOLDER; `--stored` judges those and runs nothing.
"""

from __future__ import annotations

import argparse
import copy
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from tests.benchmarks.collapse_runs import Plant, gated
from tests.benchmarks.faithfulness import add_model_arguments, load, prepared, split
from tests.benchmarks.training import Hooks, Signals, events_of, file_of, kept, signals_of
from tests.helpers.planted import fall

PROBES, EVERY, PROBED, BATCH = 12, 2, 8, 6
HEALTHY_SEEDS, PLANTED_SEEDS = range(840, 850), range(860, 865)
RATES = (1e-6, 3e-6, 1e-5)
CAUSES = {
    "values": "switched off by its values",
    "projection": "switched off by its output projection",
    "layer scale": "LayerScale at zero",
    "values of a layer": "switched off by its values",
}


def batches(count: int, size: int, seed: int):
    """Endless batches of indices, each image once before any comes again."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(count)
        yield from order[: count - count % size].reshape(-1, size)


def fine_tune(model: VisionTransformer, images: Tensor, labels: Tensor, steps: int, rate: float, seed: int):
    """Tune the whole model in place; yields the model before each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    order = batches(len(labels), BATCH, seed)
    for _ in range(steps):
        yield model
        chosen = next(order)
        loss = F.cross_entropy(model.train()(images[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.eval()


def planted(kind: str, seed: int, layers: int, heads: int) -> Plant:
    """What is switched off, where, and how fast."""
    rng = np.random.default_rng([seed, 13])
    layer, head = int(rng.integers(layers)), int(rng.integers(heads))
    gate = fall(PROBES, 6, (1, 3)[seed % 2], 0.0)
    whole = kind in ("layer scale", "values of a layer")
    places = [(layer, at) for at in range(heads)] if whole else [(layer, head)]
    place = {"projection": "output", "layer scale": "scale"}.get(kind, "value")
    return Plant([] if kind == "healthy" else places, gate, place)


def hooks_of(what: Plant, model: VisionTransformer) -> Hooks:
    """The plant's hooks; LayerScale is scaled itself."""
    heads = model.blocks[0].attn.num_heads
    if what.place != "scale":
        return gated(what, len(model.blocks), heads, model.embed_dim // heads)
    level = {"now": 1.0}

    def attach(model: VisionTransformer) -> None:
        layer = what.heads[0][0]
        model.blocks[layer].ls1.register_forward_hook(lambda _, __, out: out * level["now"])

    return Hooks(attach, lambda probe, *_: level.update(now=float(what.gate[probe])))


def series(model: VisionTransformer, train, val, what: Plant, seed: int) -> Signals:
    """The signals of one fine-tune, as `training.learn` returns them."""
    model, hooks = copy.deepcopy(model), hooks_of(what, model)
    hooks.attach(model)
    torch.manual_seed(seed)
    probed = np.random.default_rng(seed).permutation(len(val[1]))[:PROBED]
    rows = []
    for step, now in enumerate(fine_tune(model, *train, PROBES * EVERY, RATES[seed % len(RATES)], seed)):
        if step % EVERY == 0:
            hooks.before_probe(step // EVERY, now, [])
            rows.append(signals_of(now, val[0][probed], val[1][probed]))
    with torch.no_grad():
        accuracy = (model(val[0]).argmax(-1) == val[1]).float().mean()
    return {"accuracy": np.array(accuracy), **{k: np.stack([row[k] for row in rows]) for k in rows[0]}}


def judged(kind: str, what: Plant, signals: Signals) -> tuple[int, int, int, int, list[str]]:
    """Whether the plant was named, with its cause; heads flagged though nothing was done to them; and every event."""
    events = events_of(signals)
    if kind in ("layer scale", "values of a layer"):
        right = [e for e in events if e.kind == "layer_vanishing" and e.layer == what.heads[0][0]]
    else:
        right = [e for e in events if e.kind == "collapsed" and (e.layer, e.head) in what.heads]
    cause = bool(right) and right[0].cause == CAUSES.get(kind)
    false = sum(e.kind == "collapsed" and (e.layer, e.head) not in what.heads for e in events)
    delay = right[0].step - int(np.argmax(what.gate <= 0.1)) if right else -1
    said = [f"{e.kind} {e.layer}.{e.head} at {e.step} ({e.cause})" for e in events]
    return bool(right), cause, false, delay, said


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_model_arguments(parse)
    parse.add_argument("--runs", type=Path, required=True)
    parse.add_argument("--stored", action="store_true")
    args = parse.parse_args()
    torch.set_num_threads(1)
    model, images, labels, _, _ = prepared(args)
    files, _, _ = split(args.images)
    mean, std = model.pretrained_cfg["mean"], model.pretrained_cfg["std"]
    train = load([f for f, _ in files], args.size, mean, std), torch.tensor([label for _, label in files])
    layers, heads = len(model.blocks), model.blocks[0].attn.num_heads
    wanted = [("healthy", seed) for seed in HEALTHY_SEEDS]
    wanted += [(kind, seed) for seed in PLANTED_SEEDS for kind in CAUSES]
    table: dict[str, list] = {}
    for kind, seed in wanted:
        if args.stored and not file_of(args.runs, f"{kind} {seed}").exists():
            continue
        what = planted(kind, seed, layers, heads)
        signals = kept(
            args.runs, f"{kind} {seed}", lambda w=what, s=seed: series(model, train, (images, labels), w, s)
        )
        found = judged(kind, what, signals)
        table.setdefault(kind, []).append((*found, float(signals["accuracy"])))
        print(f"{kind} {seed} {what.heads[:1]}: {'; '.join(found[-1]) or 'no event'}", flush=True)
    print("\n| planted | runs | named | cause right | delay in probes | innocent heads flagged | accuracy |")
    print("|---" * 7 + "|")
    for kind, rows in table.items():
        named, right, false, delay, _, accuracy = zip(*rows, strict=True)
        late = f"{np.median([d for d in delay if d >= 0]):.0f}" if any(named) else "-"
        counts = f"{len(rows)} | {sum(named)} | {sum(right)} | {late} | {sum(false)}"
        print(f"| {kind} | {counts} | {np.mean(accuracy):.2f} |")
    print(
        "\nEvents:", {k: dict(Counter(s.split()[0] for r in rows for s in r[4])) for k, rows in table.items()}
    )


if __name__ == "__main__":
    main()
