"""How faithful are the heatmaps? All methods side by side on a timm model and an image folder.

    python -m tests.benchmarks.faithfulness --model vit_small_patch14_dinov2.lvd142m --weights FILE \
        --images DIR [--masks DIR] --size 140

`--images` holds `train/<class>/` and `val/<class>/` (or only classes: then a quarter of each is held out).
`--masks` holds one grey picture per validation image under the same class and stem, non-zero on the object;
`DIR/val_masks` is taken when it is there. A model without a head for these classes gets a linear one, fitted to
the training split. Prints Markdown.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression

from gmar_lightning.training.weights import load_weights
from tests.benchmarks.scoring import collect, method_maps, sanity, score, table

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


def parser():
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_model_arguments(parse)
    parse.add_argument("--attention", action="store_true", help="hide tokens from attention, not pixels")
    parse.add_argument(
        "--steps", type=int, default=4, help="parts of insertion and deletion; 0: by masks and sanity"
    )
    parse.add_argument("--groups", type=int, default=5, help="groups of SaCo; 0 leaves it out")
    parse.add_argument("--save", type=Path, help="per-image scores as JSON; continued when it exists")
    return parse


def add_model_arguments(parse):
    parse.add_argument("--model", required=True, help="name in timm")
    parse.add_argument("--weights", type=Path, help="file; timm's own pretrained weights when left out")
    parse.add_argument("--images", type=Path, required=True)
    parse.add_argument("--masks", type=Path)
    parse.add_argument("--size", type=int, default=224)
    parse.add_argument("--batch", type=int, default=10)
    parse.add_argument("--limit", type=int, help="validation images, drawn evenly from the classes")
    parse.add_argument("--skip", type=int, default=0, help="of these, leave out the first ones")
    parse.add_argument("--head", type=Path, help="keep the fitted head in this file, and take it from there")


def split(folder: Path, suffixes=SUFFIXES):
    """Files and labels to fit on and to validate on, and the class names; validation alternates classes."""
    parts = [folder / "train", folder / "val"] if (folder / "train").is_dir() else [folder, None]
    classes = sorted(path.name for path in parts[0].iterdir() if path.is_dir())
    train, val = [], []
    for label, name in enumerate(classes):
        files = [
            sorted(f for f in (p / name).iterdir() if f.suffix.lower() in suffixes) if p else []
            for p in parts
        ]
        if parts[1] is None:
            files = [[f for i, f in enumerate(files[0]) if i % 4], files[0][::4]]
        train += [(f, label) for f in files[0]]
        val += [((i, label), f) for i, f in enumerate(files[1])]
    return train, [(f, label) for (_, label), f in sorted(val, key=lambda item: item[0])], classes


def load(files, size, mean, std):
    """Normalised images, `(count, 3, size, size)`."""
    pictures = [
        np.asarray(Image.open(f).convert("RGB").resize((size, size), Image.Resampling.BICUBIC)) for f in files
    ]
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
    return (images - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def load_masks(folder: Path, files, size):
    """Masks beside the validation files, `(count, size, size)` of bool."""
    masks = []
    for file in files:
        found = next((folder / file.parent.name).glob(f"{file.stem}.*"), None)
        if found is None:
            raise FileNotFoundError(f"no mask for {file.parent.name}/{file.name} in {folder}")
        masks.append(
            np.asarray(Image.open(found).convert("L").resize((size, size), Image.Resampling.NEAREST)) > 0
        )
    return torch.from_numpy(np.stack(masks))


@torch.no_grad()
def features(model, images, batch):
    return torch.cat(
        [model.forward_head(model.forward_features(x), pre_logits=True) for x in images.split(batch)]
    )


def prepared(args):
    """The model with a head, validation images, labels, masks or None, and class names."""
    train, val, classes = split(args.images)
    val = val[args.skip : args.limit]
    options = {"num_classes": len(classes), "img_size": args.size}
    model = timm.create_model(args.model, pretrained=args.weights is None, **options).eval()
    before = model.get_classifier().weight.clone()
    if args.weights:
        load_weights(model, args.weights)
    mean, std = model.pretrained_cfg["mean"], model.pretrained_cfg["std"]
    if args.head and args.head.exists():
        model.get_classifier().load_state_dict(torch.load(args.head))
    elif args.weights is None or torch.equal(before, model.get_classifier().weight):
        fit_head(model, train, args, mean, std)
    images = load([f for f, _ in val], args.size, mean, std)
    folder = args.masks or (args.images / "val_masks" if (args.images / "val_masks").is_dir() else None)
    masks = load_masks(folder, [f for f, _ in val], args.size) if folder else None
    return model, images, torch.tensor([label for _, label in val]), masks, classes


def fit_head(model, train, args, mean, std):
    """Logistic regression on what the head reads, put in the head's place."""
    inputs = features(model, load([f for f, _ in train], args.size, mean, std), args.batch)
    fitted = LogisticRegression(C=0.1, max_iter=2000).fit(inputs.numpy(), [label for _, label in train])
    head = model.get_classifier()
    weight, bias = fitted.coef_, fitted.intercept_
    if len(weight) == 1:  # two classes share one row
        weight, bias = np.concatenate([-weight / 2, weight / 2]), np.concatenate([-bias / 2, bias / 2])
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(weight))
        head.bias.copy_(torch.from_numpy(bias))
    if args.head:
        torch.save(head.state_dict(), args.head)


def main():
    args = parser().parse_args()
    model, images, labels, masks, classes = prepared(args)
    saved = json.loads(args.save.read_text()) if args.save and args.save.exists() else {}
    scores, right, done = saved.get("scores", {}), saved.get("right", 0), saved.get("done", 0)
    started = time.time()
    for start in range(done, len(images), args.batch):
        rows = slice(start, start + args.batch)
        with torch.no_grad():
            targets = model(images[rows]).argmax(-1)
        right += int((targets == labels[rows]).sum())
        maps = method_maps(model, images[rows], targets)
        part = masks[rows] if masks is not None else None
        options = {"steps": args.steps, "groups": args.groups, "attention": args.attention, "masks": part}
        collect(scores, score(model, images[rows], targets, maps, **options))
        collect(scores, sanity(model, images[rows], targets, maps))
        if args.save:
            args.save.write_text(json.dumps({"scores": scores, "right": right, "done": start + len(targets)}))
    removal = (
        "tokens hidden from attention" if args.attention else "insertion from blur, deletion to mean colour"
    )
    print(f"{args.model} at {args.size} px, {len(images)} validation images of {len(classes)} classes")
    print(f"accuracy {right / len(images):.3f}; {removal}; {args.steps} steps, {args.groups} groups")
    if masks is not None:
        print(f"the object covers {masks.float().mean():.3f} of the pictures")
    print(f"{time.time() - started:.0f} s; mean ± standard error over images\n")
    print(table(scores))
    print("\nPaired difference to plain rollout:\n")
    print(table(scores, against="rollout (flow, uniform)"))


if __name__ == "__main__":
    main()
