"""Do the head scores tell which heads matter? Every head is ablated in turn, and the scores are held against it.

    python -m tests.benchmarks.head_importance --model vit_small_patch14_dinov2.lvd142m --weights FILE \
        --images DIR --size 140 --limit 78 --probe 30

Arguments as for `tests.benchmarks.faithfulness`. The truth is what happens when a head's output is set to zero, or to
its mean over the images of a batch: the mean absolute change of the label's logit and of the loss over the first
`--probe` validation images. The other images are held out for the pruning curves: accuracy after the heads with the
lowest scores are removed. With `--stages 0 30 60` the model is fine-tuned as a whole, and the correlations are
printed after so many steps, without the curves. Cost: two forwards per head and probe image, and one per held-out
image and point of a curve. Prints Markdown.
"""

import argparse
import time

import numpy as np
import torch
from scipy.stats import spearmanr
from torch.nn import functional

from gmar_lightning.explain.ablation import ablate_heads, head_outputs
from gmar_lightning.explain.attention import record_attention
from gmar_lightning.explain.gmar import gmar
from gmar_lightning.explain.isolation import undisturbed
from tests.benchmarks.faithfulness import add_model_arguments, load, prepared, split
from tests.benchmarks.fine_tunes import fine_tune

PRUNED_BY = ("GMAR L1, raw", "GMAR L1, share", "contribution to the loss", "output norm")
RANDOM_ORDERS = 3
METHODS = ("zero", "mean")


def parser():
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_model_arguments(parse)
    parse.add_argument("--probe", type=int, default=32, help="images that heads are scored and ablated on")
    parse.add_argument(
        "--removed", type=float, nargs="*", default=[0.1, 0.2, 0.3, 0.4, 0.5], help="shares of all heads"
    )
    parse.add_argument("--stages", type=int, nargs="*", help="steps of a fine-tune after which to measure")
    parse.add_argument("--rate", type=float, default=3e-5, help="learning rate of the fine-tune")
    return parse


def gate_scores(model, images, labels):
    """Gradient at a gate on each head's output, `|sum dO . O|` (Michel et al. 2019), and the output's norm.

    Returns:
        Three `(batch, layers, heads)`: gate gradient of the logit, of the loss, and magnitude.
    """
    with undisturbed(model), record_attention(model) as calls:
        logits = model(images)
        outputs = [call.output for call in calls]
        values = (
            logits.gather(1, labels[:, None]).sum(),
            functional.cross_entropy(logits, labels, reduction="sum"),
        )
        found = []
        for value in values:
            grads = torch.autograd.grad(value, outputs, retain_graph=True)
            gates = [(g * o).sum((-2, -1)).abs() for g, o in zip(grads, outputs, strict=True)]
            found.append(torch.stack(gates, 1).detach())
        found.append(torch.stack([o.detach().square().sum((-2, -1)).sqrt() for o in outputs], 1))
    return found


def head_scores(model, images, labels):
    """Every score, `(batch, layers, heads)` by name."""
    l1 = gmar(model, images, labels, norm="l1")
    l2 = gmar(model, images, labels, norm="l2")
    gate_logit, gate_loss, magnitude = gate_scores(model, images, labels)
    return {
        "GMAR L1, raw": l1.importance,
        "GMAR L2, raw": l2.importance,
        "GMAR L1, share": l1.head_weights,
        "GMAR L2, share": l2.head_weights,
        "contribution": gate_logit,
        "contribution to the loss": gate_loss,
        "output norm": magnitude,
    }


def ablation_effects(model, images, labels, shape):
    """Absolute change of logit and loss without each head, `(batch, layers, heads)` by what is changed and how."""
    with torch.no_grad():
        logits = model(images)
    places = list(np.ndindex(*shape))
    means = {at: output.mean(0) for at, output in head_outputs(model, images, heads=places).items()}
    effects = {
        f"{what}, {how}": torch.zeros(len(images), *shape) for what in ("logit", "loss") for how in METHODS
    }
    for at in places:
        for how in METHODS:
            found = ablate_heads(model, images, labels, heads=[at], logits=logits, method=how, means=means)
            effects[f"logit, {how}"][:, *at] = found.logit_change.abs()
            effects[f"loss, {how}"][:, *at] = found.loss_change.abs()
    return effects


def measure(model, images, labels, batch):
    """Scores and effects, mean over images, `(layers, heads)` each."""
    scores, effects = {}, {}
    for x, y in zip(images.split(batch), labels.split(batch), strict=True):
        found = head_scores(model, x, y)
        shape = next(iter(found.values())).shape[1:]
        for kept, new in ((scores, found), (effects, ablation_effects(model, x, y, shape))):
            for name, values in new.items():
                kept[name] = kept.get(name, 0) + values.sum(0).numpy() / len(images)
    return scores, effects


def correlation_table(scores, effects):
    """Spearman correlation of every score with the effects of ablation, over all heads and within layers."""
    lines = ["| score | " + " | ".join(f"{e}: all heads | {e}: within layers" for e in effects) + " |"]
    lines.append("|---" * (1 + 2 * len(effects)) + "|")
    for name, score in scores.items():
        cells = []
        for effect in effects.values():
            within = [spearmanr(a, b).statistic for a, b in zip(score, effect, strict=True)]
            cells.append(f"{spearmanr(score.ravel(), effect.ravel()).statistic:.2f}")
            cells.append(f"{np.mean(within):.2f} ({min(within):.2f} … {max(within):.2f})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def layer_table(scores, effect):
    """Within-layer correlations with the change of the logit, layer by layer."""
    layers = len(effect)
    lines = [f"| score | {' | '.join(map(str, range(layers)))} |", "|---" * (layers + 1) + "|"]
    for name, score in scores.items():
        cells = [f"{spearmanr(a, b).statistic:.2f}" for a, b in zip(score, effect, strict=True)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def accuracy_without(model, images, labels, heads, batch):
    right = 0
    for x, y in zip(images.split(batch), labels.split(batch), strict=True):
        # Only the predictions count here; handing in any logits saves the forward of the intact model.
        blank = torch.zeros(len(y), int(labels.max()) + 1)
        right += int((ablate_heads(model, x, y, heads=heads, logits=blank).predictions == y).sum())
    return right / len(images)


def pruning_table(model, images, labels, scores, args):
    """Accuracy on held-out images after the least important heads are gone."""
    layers, heads = next(iter(scores.values())).shape
    places = list(np.ndindex(layers, heads))
    orders = {name: [np.argsort(scores[name].ravel(), kind="stable")] for name in PRUNED_BY}
    orders["most important first (GMAR L1, raw)"] = [orders["GMAR L1, raw"][0][::-1]]
    orders[f"random, mean of {RANDOM_ORDERS}"] = [
        np.random.default_rng(seed).permutation(len(places)) for seed in range(RANDOM_ORDERS)
    ]
    counts = [round(share * len(places)) for share in args.removed]
    intact = accuracy_without(model, images, labels, [], args.batch)
    lines = [f"| heads removed, of {len(places)} | 0 | {' | '.join(map(str, counts))} |"]
    lines.append("|---" * (len(counts) + 2) + "|")
    for name, several in orders.items():
        curve = [
            np.mean(
                [
                    accuracy_without(model, images, labels, [places[i] for i in order[:count]], args.batch)
                    for order in several
                ]
            )
            for count in counts
        ]
        lines.append(f"| {name} | {intact:.2f} | {' | '.join(f'{value:.2f}' for value in curve)} |")
    return "\n".join(lines)


def stages(model, images, labels, args):
    """Print the correlations at several points of a fine-tune on the training split."""
    files, _, _ = split(args.images)
    mean, std = model.pretrained_cfg["mean"], model.pretrained_cfg["std"]
    train = load([f for f, _ in files], args.size, mean, std), torch.tensor([label for _, label in files])
    torch.manual_seed(0)
    for step, now in enumerate(fine_tune(model, *train, max(args.stages) + 1, args.rate, seed=0)):
        if step in args.stages:
            with torch.no_grad():
                right = torch.cat([now(x).argmax(-1) for x in images.split(args.batch)]) == labels
            scores, effects = measure(now, images[: args.probe], labels[: args.probe], args.batch)
            print(f"\nAfter {step} steps, accuracy {right.float().mean():.2f} on {len(labels)} images:\n")
            print(correlation_table(scores, effects), flush=True)


def main():
    args = parser().parse_args()
    model, images, labels, _, classes = prepared(args)
    started = time.time()
    if args.stages:
        stages(model, images, labels, args)
        return
    scores, effects = measure(model, images[: args.probe], labels[: args.probe], args.batch)
    layers, heads = effects["logit, zero"].shape
    print(f"{args.model} at {args.size} px, {layers} x {heads} heads, {len(classes)} classes")
    print(
        f"Spearman correlation with the effect of ablation, {args.probe} images, {time.time() - started:.0f} s\n"
    )
    print(correlation_table(scores, effects))
    print("\nWithin each layer, with the change of the logit:\n")
    print(layer_table(scores, effects["logit, zero"]))
    held_out = images[args.probe :], labels[args.probe :]
    if len(held_out[0]):
        print(
            f"\nAccuracy on {len(held_out[0])} held-out images without the heads that score lowest:\n",
            flush=True,
        )
        print(pruning_table(model, *held_out, scores, args))


if __name__ == "__main__":
    main()
