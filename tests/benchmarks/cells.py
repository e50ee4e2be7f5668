"""Do the heatmaps find evidence whose place is known? A model trained from scratch, and where its maps look.

    python -m tests.benchmarks.cells [--data cells] [--epochs 7]

`cells`: one real digit sits in one of four cells, digits with shuffled pixels in the others. `watermark`: a coloured
square in the corner of every digit tells the class (`gmar_lightning.training.planted`). Nothing is downloaded.
Prints, over training, accuracy and the share of each heatmap on the evidence; then, for the trained model,
faithfulness and sanity of every method, weightings, and head scores against ablation. Minutes on a CPU.
"""

import argparse
import time

import timm
import torch
from torch.nn import functional

from gmar_lightning.explain.localisation import energy_in_mask
from gmar_lightning.training.planted import Cells, WatermarkedDigits
from tests.benchmarks.head_importance import correlation_table, measure, pruning_table
from tests.benchmarks.scoring import collect, method_maps, sanity, score, standard_error, table
from tests.benchmarks.weightings import DEFAULT, PLAIN, weighting_maps

DATA = {"cells": Cells, "watermark": WatermarkedDigits}


def parser():
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parse.add_argument("--data", choices=DATA, default="cells")
    parse.add_argument("--epochs", type=int, default=7)
    parse.add_argument("--images", type=int, default=200, help="validation images for the last tables")
    parse.add_argument("--steps", type=int, default=8)
    parse.add_argument("--groups", type=int, default=8)
    parse.add_argument("--seed", type=int, default=0)
    parse.set_defaults(batch=50, removed=[0.1, 0.2, 0.35, 0.5])
    return parse


def stacked(dataset):
    """Images, labels and masks of a whole set."""
    return tuple(
        torch.stack([torch.as_tensor(part) for part in column]) for column in zip(*dataset, strict=True)
    )


def row_of(model, images, labels, masks):
    """Accuracy on the validation set and the share of each map on the evidence."""
    with torch.no_grad():
        right = torch.cat([model(x).argmax(-1) for x in images.split(100)]) == labels
    maps = method_maps(model, images[:100], labels[:100])
    return float(right.float().mean()), {
        name: standard_error(energy_in_mask(drawn, masks[:100])) for name, drawn in maps.items()
    }


def train(train_set, val_set, epochs, seed):
    """Train from scratch; prints a table row at the start and after every second epoch."""
    torch.manual_seed(seed)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=4, embed_dim=96, depth=4, num_heads=4, num_classes=10,
        weight_init="jax",
    )  # fmt: skip
    images, labels, _ = train_set
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    steps = epochs * (len(images) // 48)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    for epoch in range(epochs + 1):
        if epoch % 2 == 0 or epoch == epochs:
            accuracy, shares = row_of(model.eval(), *val_set)
            if epoch == 0:
                print(f"| epoch | accuracy | {' | '.join(shares)} |\n{'|---' * (len(shares) + 2)}|")
            cells = " | ".join(f"{mean:.2f} ± {error:.2f}" for mean, error in shares.values())
            print(f"| {epoch} | {accuracy:.2f} | {cells} |", flush=True)
        model.train()
        for rows in torch.randperm(len(images)).split(48) if epoch < epochs else ():
            if len(rows) < 48:
                continue
            optimizer.zero_grad()
            functional.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def judged(model, images, masks, args, maps_of, attention=False):
    """Scores of all maps of the validation images, for the predicted class."""
    scores = {}
    for x, part in zip(images.split(args.batch), masks.split(args.batch), strict=True):
        with torch.no_grad():
            targets = model(x).argmax(-1)
        options = {"steps": args.steps, "groups": args.groups, "attention": attention, "masks": part}
        maps = maps_of(model, x, targets)
        collect(scores, score(model, x, targets, maps, **options))
        if maps_of is method_maps and not attention:
            collect(scores, sanity(model, x, targets, maps))
    return scores


def main():
    args = parser().parse_args()
    data = DATA[args.data](image_size=32, mean=[0.5] * 3, std=[0.5] * 3, seed=args.seed)
    data.setup()
    train_set, val_set = stacked(data.train_set), stacked(data.val_set)
    started = time.time()
    print("Share of the heatmap on the evidence, mean ± standard error over 100 images.")
    print(f"Chance is {val_set[2].float().mean():.3f}.\n")
    model = train(train_set, val_set, args.epochs, args.seed)
    print(f"\ntrained in {time.time() - started:.0f} s")
    images, labels, masks = (part[: args.images] for part in val_set)
    for attention in (False, True):
        removal = (
            "tokens hidden from attention" if attention else "insertion from blur, deletion to mean colour"
        )
        print(f"\n{len(images)} images; {removal}:\n")
        print(table(judged(model, images, masks, args, method_maps, attention)), flush=True)
    scores = judged(model, images, masks, args, weighting_maps)
    print(f"\nOther weightings, pixels removed:\n\n{table(scores)}")
    for other in (PLAIN, DEFAULT):
        print(f"\nPaired difference to {other}:\n\n{table(scores, against=other)}", flush=True)
    scores, effects = measure(model, images[:100], labels[:100], args.batch)
    print(f"\nHead scores against ablation, 100 images:\n\n{correlation_table(scores, effects)}", flush=True)
    held_out = images[100:], labels[100:]
    print(f"\nAccuracy on {len(held_out[0])} held-out images without the heads that score lowest:\n")
    print(pruning_table(model, *held_out, scores, args))


if __name__ == "__main__":
    main()
