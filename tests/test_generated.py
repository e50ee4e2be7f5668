"""Architectures put together at random: each is exact against the materialised reference, or refused.

What mixes tokens beside the attention is known here by construction: a picture of such a model is wrong whatever it
shows.
"""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gmar_lightning import UnsupportedModelError, gmar
from tests.helpers.mixers import MIXERS, ROWWISE
from tests.helpers.networks import CLASSES, DIM, Attention, Tokens, pictures, seeded
from tests.helpers.reference import reference, relative_error

# Mixers and row-wise layers whose weights do not know the number of tokens.
FIXED = {"einsum", "matmul", "traced attention", "a gate that starts small", "permuted patches"}
MIXING = sorted(set(MIXERS) - FIXED)
ROWS = sorted(set(ROWWISE) - {"positions added", "weight per position"})


def product(q, k, v):
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v


def einsum(q, k, v):
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), v)


def merged(q, k, v):
    return F.scaled_dot_product_attention(*(x.flatten(0, 1) for x in (q, k, v))).view_as(q)


def fused(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)  # by its name, which the reference exchanges


KINDS = {"fused": fused, "product": product, "einsum": einsum, "merged": merged}


class Mixer(Attention):
    """One function, written in different ways; the reference is shown the fused one."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, x):
        return self.proj(KINDS[self.kind](*self.qkv(x)).transpose(1, 2).flatten(2))


class MultiHead(nn.MultiheadAttention):
    kind = "fused"

    def __init__(self):
        super().__init__(DIM, 3, batch_first=True)

    def forward(self, x):
        return super().forward(x, x, x, need_weights=False)[0]


class Layer(nn.Module):
    """Norm, mixer and residual in some order, and what follows token by token."""

    def __init__(self, inner, order, residual):
        super().__init__()
        self.inner, self.order, self.residual = inner, order, residual
        self.norm = nn.LayerNorm(DIM) if order != "none" else nn.Identity()

    def forward(self, x):
        y = self.inner(self.norm(x) if self.order == "before" else x)
        y = x + y if self.residual else y
        return self.norm(y) if self.order == "behind" else y


class Generated(nn.Module):
    def __init__(self, seed):
        super().__init__()
        draw = random.Random(seed)
        self.front, self.behind = draw.choice([0, 1, 1, 2, 5]), draw.choice([0, 0, 1, 3])
        self.tokens = Tokens(prefix=self.front)
        self.suffix = nn.Parameter(torch.randn(1, self.behind, DIM))
        layers, self.plan = [], []
        depth = draw.randint(1, 4)
        # Only in front of the last attention: behind it a mixer may leave alone what is read.
        mixed = draw.randrange(depth) if draw.random() < 0.3 else None
        for index in range(depth):
            if index == mixed:
                self.plan.append(draw.choice(MIXING))
                layers.append(MIXERS[self.plan[-1]]())
            attention = MultiHead() if draw.random() < 0.2 else Mixer(draw.choice(sorted(KINDS)))
            order = draw.choice(["before", "before", "behind", "none"])
            layers.append(Layer(attention, order, draw.random() < 0.85))
            self.plan.append(f"{type(attention).__name__} {attention.kind} {order}")
            if draw.random() < 0.6:
                self.plan.append(draw.choice(ROWS))
                layers.append(Layer(ROWWISE[self.plan[-1]](), draw.choice(["before", "none"]), True))
        self.layers, self.norm = nn.ModuleList(layers), nn.LayerNorm(DIM)
        first, last = self.front, self.front + 16
        self.reads = {
            "patches": slice(first, last), "all": slice(None), "last": slice(-1, None), "max": slice(None),
            "weighted": slice(None), **({"class": slice(0, 1)} if self.front else {}),
        }  # fmt: skip
        self.read = draw.choice(["patches", *self.reads])
        self.head = nn.Linear(DIM, CLASSES)
        # In front of all attention a closed gate changes nothing until it opens, which every call looks at; and
        # routing that sends the same tokens through for every image tried mixes none of them (docs/models.md).
        self.closed = mixed == 0 and self.plan[0] in ("a gate that starts closed", "routing with a capacity")
        self.wrong = (mixed is not None and not self.closed) or self.read in ("max", "weighted")

    def __str__(self):
        return f"{self.front} + patches + {self.behind}, {', '.join(self.plan)}, reads {self.read}"

    def forward(self, images):
        x = torch.cat([self.tokens(images), self.suffix.expand(len(images), -1, -1)], 1)
        for layer in self.layers:
            x = layer(x)
        x = self.norm(x)[:, self.reads[self.read]]
        if self.read == "weighted":
            return self.head((x * torch.linspace(0.2, 1, x.shape[1])[:, None]).sum(1))
        return self.head(x.amax(1) if self.read == "max" else x.mean(1))

    def row(self):
        row = torch.zeros(self.front + 16 + self.behind)
        row[self.reads[self.read]] = 1
        return row / row.sum()


def verdict(seed):
    """Whether a model was shown; fails when what is shown is wrong."""
    model = seeded(Generated, seed, seed=seed)
    forms = ("gradient", "paper", "flow")
    try:
        found = gmar(model, pictures(seed=seed), rollout=forms)
    except UnsupportedModelError as refusal:
        # A refusal of a model that is plain is false.
        return "refused" if model.wrong or model.closed else f"{seed}: {model}: {refusal}"
    if model.wrong and found.heatmaps is not None:
        pytest.fail(f"accepted: {seed}: {model}")
    for module in model.modules():
        if isinstance(module, Mixer):
            module.kind = "fused"
    for form in forms:
        expected = reference(model, pictures(seed=seed), found.targets, read=model.row(), rollout=form)
        importance = torch.stack(expected.importance, 1)
        assert relative_error(found.importance, importance) < 1e-4, f"{seed}: {model}"
        if found.heatmaps is not None:
            patches = expected.row[:, model.front : model.front + 16].reshape(2, 4, 4)
            assert relative_error(found.maps[form], patches) < 1e-4, f"{seed}: {model}"
    return "exact"


def check(seeds):
    verdicts = [verdict(seed) for seed in seeds]
    false = [one for one in verdicts if one not in ("exact", "refused")]
    assert not false, "\n".join(false)
    assert verdicts.count("exact") > 0.3 * len(verdicts)
    assert verdicts.count("refused") > 0.2 * len(verdicts)


def test_generated_architectures():
    check(range(25))


def test_a_gate_in_front_of_all_attention_that_opens():
    model = seeded(Generated, 1195, seed=1195)
    assert model.closed
    gmar(model, pictures())
    nn.init.constant_(model.layers[0].gate, 0.1)
    with pytest.raises(UnsupportedModelError, match=r"mixed outside the attention, before layers\.1\.inner"):
        gmar(model, pictures())


@pytest.mark.slow
def test_two_hundred_generated_architectures():
    check(range(1000, 1200))
