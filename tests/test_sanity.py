"""Sanity checks of the explanations themselves, on tiny models trained here.

Parameter randomisation (Adebayo et al. 2018): a map that survives it does not explain the model. Planted shortcut:
where a watermark gives the class away, the map of a model that uses it must light up there, and the map of a model
that cannot use it must not.
"""

import copy

import pytest
import timm
import torch
from torch.nn import functional

from gmar_lightning.explain.gmar import gmar
from gmar_lightning.explain.localisation import energy_in_mask
from gmar_lightning.training.planted import WatermarkedDigits

PATCH = 8
FORMS = ("paper", "flow", "gradient")


def digits(correlation):
    data = WatermarkedDigits(image_size=32, correlation=correlation, mean=[0.5] * 3, std=[0.5] * 3)
    data.setup()
    parts = {}
    for name, items in (("train", data.train_set), ("val", data.val_set)):
        images, labels, *_ = zip(*(items[i] for i in range(len(items))), strict=True)
        parts[name] = torch.stack(images), torch.tensor(labels)
    return parts


def trained(images, labels, epochs):
    torch.manual_seed(0)
    model = untrained()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(64):
            loss = functional.cross_entropy(model(images[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def untrained():
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=PATCH,
        embed_dim=64,
        depth=2,
        num_heads=4,
        num_classes=10,
    )


@pytest.fixture(scope="module")
def marked():
    return digits(correlation=1.0)


@pytest.fixture(scope="module")
def shortcut(marked):
    return trained(*marked["train"], epochs=4)


def rank_correlation(first, second):
    ranks = [maps.flatten(1).argsort(1).argsort(1).double() for maps in (first, second)]
    ranks = [(r - r.mean(1, keepdim=True)) / r.std(1, keepdim=True, correction=0) for r in ranks]
    return float((ranks[0] * ranks[1]).mean(1).mean())


@pytest.mark.parametrize("form", FORMS)
def test_randomised_parameters_change_the_map(shortcut, marked, form):
    images, labels = (part[:64] for part in marked["val"])
    explained = gmar(shortcut, images, labels, rollout=form).heatmaps
    nudged = copy.deepcopy(shortcut)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in nudged.parameters():
            parameter.add_(parameter.std() * 1e-3 * torch.randn_like(parameter))
    random = untrained().eval()
    assert rank_correlation(explained, gmar(nudged, images, labels, rollout=form).heatmaps) > 0.95
    assert rank_correlation(explained, gmar(random, images, labels, rollout=form).heatmaps) < 0.4


def test_a_random_head_changes_what_depends_on_the_class(shortcut, marked):
    """Plain rollout never looks at the class, so it passes no such check; the gradient-gated form does."""
    images, labels = (part[:64] for part in marked["val"])
    beheaded = copy.deepcopy(shortcut)
    torch.manual_seed(1)
    torch.nn.init.normal_(beheaded.head.weight)
    correlation = {}
    for form in ("flow", "gradient"):
        maps = [gmar(m, images, labels, norm="uniform", rollout=form).heatmaps for m in (shortcut, beheaded)]
        correlation[form] = rank_correlation(*maps)
    assert correlation["flow"] == pytest.approx(1.0)
    assert correlation["gradient"] < 0.9


@pytest.mark.slow
def test_the_map_finds_a_planted_shortcut(shortcut, marked):
    """The mark is coloured in both trainings; only in one its colour tells the class."""
    honest = trained(*digits(correlation=0.0)["train"], epochs=10)
    images, labels = (part[:128] for part in marked["val"])
    mask = torch.zeros(128, 32, 32)
    mask[:, :PATCH, :PATCH] = 1  # the patch that holds the mark
    with torch.no_grad():
        accuracy = {m: float((m(images).argmax(-1) == labels).float().mean()) for m in (shortcut, honest)}
    assert min(accuracy.values()) > 0.6  # both have learnt something, or there is nothing to tell apart
    for form in FORMS:
        with_it, without = (
            energy_in_mask(gmar(m, images, labels, rollout=form).heatmaps, mask).mean()
            for m in (shortcut, honest)
        )
        assert with_it > 1.5 / 16  # well above its share of the picture
        assert without < 1 / 16
        assert with_it > 3 * without
