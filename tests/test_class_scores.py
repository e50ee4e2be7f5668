"""Class scores are explained, features are not: what a module without its head returns, and every kind of head."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from gmar_lightning import UnsupportedModelError, gmar
from gmar_lightning.targets import Similarity
from tests.helpers.networks import CLASSES, DIM, ViT, pictures, seeded
from tests.helpers.reference import reference, relative_error


class Ending(ViT):
    """A ViT that ends in a function of `(model, tokens)`; `end` holds the weights it needs, for `classes` of them."""

    def __init__(self, end, classes=CLASSES):
        super().__init__(depth=2)
        self.end = end
        self.linear, self.second = nn.Linear(DIM, classes), nn.Linear(DIM, classes)
        self.square, self.neck, self.act = nn.Linear(DIM, DIM), nn.BatchNorm1d(DIM), nn.GELU()
        self.after = nn.BatchNorm1d(classes, affine=False)
        self.prototypes = nn.Parameter(torch.randn(classes, DIM))
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.conv, self.bilinear = nn.Conv2d(DIM, classes, 1), nn.Bilinear(DIM, DIM, classes)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(DIM, classes))

    def forward(self, images):
        return self.end(self, self.features(images))


def unnormed(m, x):
    """Without the last norm: the bare residual stream."""
    m.norm.forward = lambda tokens: tokens
    return x


HEADLESS = {
    "class token": lambda m, x: x[:, 0],
    "mean": lambda m, x: x[:, 1:].mean(1),
    "mean over a last axis": lambda m, x: x[:, 1:].mT.mean(-1),
    "pooled as a grid": lambda m, x: F.adaptive_avg_pool2d(x[:, 1:].mT.unflatten(2, (4, 4)), 1).flatten(1),
    "second norm": lambda m, x: m.norm(x[:, 1:].mean(1)),
    "neck": lambda m, x: m.neck(x[:, 0]),
    "class token beside the mean": lambda m, x: torch.cat([x[:, 0], x[:, 1:].mean(1)], -1),
    "scaled": lambda m, x: m.scale.exp() * x[:, 0],
    "dropout": lambda m, x: F.dropout(x[:, 0], 0.1),
    "unit length": lambda m, x: F.normalize(x[:, 0], dim=-1),
    "tanh": lambda m, x: m.square(x[:, 0]).tanh(),
    "hidden layer": lambda m, x: m.act(m.square(x[:, 0])),
    "normalised hidden layer": lambda m, x: m.neck(m.square(x[:, 0])),
    "normalised projection": lambda m, x: F.normalize(m.linear(x[:, 0]), dim=-1),
    "residual adapter": lambda m, x: x[:, 0] + m.square(x[:, 0]),
}


@pytest.mark.parametrize("kind", HEADLESS)
def test_features_are_no_class_scores(kind):
    with pytest.raises(UnsupportedModelError, match=r"features instead of class scores.*callable target"):
        gmar(seeded(Ending, HEADLESS[kind]), pictures())


HEADS = {
    "linear": lambda m, x: m.linear(x[:, 0]),
    "linear on the mean": lambda m, x: m.linear(x[:, 1:].mean(1)),
    "linear before the mean": lambda m, x: m.linear(x[:, 1:]).mean(1),
    "two layers": lambda m, x: m.linear(m.act(m.square(x[:, 0]))),
    "cosine": lambda m, x: 16 * F.linear(F.normalize(x[:, 0], dim=-1), F.normalize(m.prototypes, dim=-1)),
    "cosine without a factor": lambda m, x: (
        F.normalize(x[:, 0], dim=-1) @ F.normalize(m.prototypes, dim=-1).T
    ),
    "cosine by its function": lambda m, x: F.cosine_similarity(x[:, :1], m.prototypes, dim=-1),
    "weight norm": lambda m, x: m.normed(x[:, 0]),
    "temperature": lambda m, x: m.scale.exp() * m.linear(x[:, 0]),
    "log-softmax": lambda m, x: m.linear(x[:, 0]).log_softmax(-1),
    "softmax": lambda m, x: m.linear(x[:, 0]).softmax(-1),
    "sigmoid": lambda m, x: m.linear(x[:, 0]).sigmoid(),
    "capped": lambda m, x: 30 * (m.linear(x[:, 0]) / 30).tanh(),
    "evidence": lambda m, x: F.softplus(m.linear(x[:, 0])),
    "normalised scores": lambda m, x: F.normalize(m.linear(x[:, 0]), dim=-1) / 0.04,
    "batch-normalised scores": lambda m, x: m.after(m.linear(x[:, 0])),
    "sum of two heads": lambda m, x: m.linear(x[:, 0]) + m.second(x[:, 0]),
    "two tokens": lambda m, x: (m.linear(x[:, 0]) + m.second(x[:, 1])) / 2,
    "low-rank addition": lambda m, x: (
        m.linear(x[:, 0]) + (x[:, 0] @ m.prototypes.T[:, :2]) @ m.prototypes[:, :2].T
    ),
    "convolution": lambda m, x: m.conv(x[:, 0, :, None, None]).flatten(1),
    "convolution before the mean": lambda m, x: m.conv(x[:, 1:].mT.unflatten(2, (4, 4))).mean((2, 3)),
    "distances": lambda m, x: -torch.cdist(x[:, 0], m.prototypes),
    "distances by hand": lambda m, x: -(x[:, :1] - m.prototypes).square().sum(-1),
    "distances by their norm": lambda m, x: -(x[:, :1] - m.prototypes).norm(dim=-1),
    "products by hand": lambda m, x: (x[:, :1] * m.prototypes).sum(-1),
    "einsum": lambda m, x: torch.einsum("bd,cd->bc", x[:, 0], m.prototypes),
    "bilinear": lambda m, x: m.bilinear(x[:, 0], x[:, 0].tanh()),
}


@pytest.mark.parametrize("classes", [CLASSES, DIM], ids=["", "as many classes as channels"])
@pytest.mark.parametrize("kind", HEADS)
def test_every_kind_of_head_is_explained(kind, classes):
    # Scores that end as hidden layers do, with exactly as many classes as channels, look like features.
    if classes == DIM and kind in ("capped", "batch-normalised scores"):
        return
    model = seeded(Ending, HEADS[kind], classes)
    expected = reference(model, pictures(), grid=(4, 4))
    importance = torch.stack(expected.importance, 1)
    assert relative_error(gmar(model, pictures()).importance, importance) < 1e-5


def test_features_of_an_embedding_are_explained_by_a_callable_target():
    model = seeded(Ending, HEADLESS["class token"])
    result = gmar(model, pictures(), Similarity(torch.ones(DIM)))
    assert result.heatmaps.shape == (2, 4, 4)
    head = nn.Linear(DIM, CLASSES)
    assert gmar(model, pictures(), lambda output: head(output)[:, 3]).heatmaps.shape == (2, 4, 4)


TIMM = {
    "vit": {"embed_dim": 24, "depth": 2, "num_heads": 2},
    "mean and fc_norm": {"embed_dim": 24, "depth": 2, "num_heads": 2, "global_pool": "avg"},
    "attention pool": {
        "embed_dim": 24,
        "depth": 2,
        "num_heads": 2,
        "global_pool": "map",
        "class_token": False,
    },
    "register tokens": {"embed_dim": 24, "depth": 2, "num_heads": 2, "reg_tokens": 2},
    "layer scale": {"embed_dim": 24, "depth": 2, "num_heads": 2, "init_values": 1e-5},
}


@pytest.mark.parametrize("kind", TIMM)
def test_timm_without_and_with_its_head(kind):
    build = lambda classes: timm.models.VisionTransformer(32, 8, num_classes=classes, **TIMM[kind])  # noqa: E731
    with pytest.raises(UnsupportedModelError, match="features instead of class scores"):
        gmar(seeded(build, 0), pictures())
    assert gmar(seeded(build, 24), pictures()).heatmaps.shape == (2, 4, 4)


def test_a_hierarchical_model_without_and_with_its_head():
    def build(classes):
        return timm.models.SwinTransformer(
            32, 4, num_classes=classes, embed_dim=12, depths=(1, 1), num_heads=(2, 2), window_size=4
        )

    with pytest.raises(UnsupportedModelError, match="features instead of class scores"):
        gmar(seeded(build, 0), pictures())
    assert gmar(seeded(build, 24), pictures()).importance.isfinite().all()
