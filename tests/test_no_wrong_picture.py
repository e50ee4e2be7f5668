"""What is accepted is exact: every class of a plausible wrong picture, refused or shown against a reference."""

import pytest
import torch
from torch import nn

from gmar_lightning import UnsupportedModelError, gmar
from tests.helpers.mixers import MIXERS, ROWWISE
from tests.helpers.networks import DIM, Block, ViT, pictures, seeded
from tests.helpers.reference import reference, relative_error


class Mixed(ViT):
    """A ViT with a module of `(batch, tokens, channels)` in one place between its blocks."""

    def __init__(self, mixer, place, read="class", **options):
        super().__init__(**options)
        self.mixer, self.place, self.read = mixer(), place, read

    def forward(self, images):
        x = self.tokens(images)
        for index, block in enumerate(self.blocks):
            x = self.mixer(x) if index == self.place else x
            x = block(x)
        x = self.norm(self.mixer(x) if self.place == len(self.blocks) else x)
        return self.head(x[:, 0] if self.read == "class" else x[:, 1:].mean(1))


# After the last block these leave the class token, which alone is read there, as it was.
HARMLESS = {"reversed patches", "permuted patches", "GRU", "RNN", "matmul", "cumulative sum", "Fourier"}
HARMLESS |= {"routing with a capacity"}  # the class token is not among the six


@pytest.mark.parametrize("read", ["class", "mean"])
@pytest.mark.parametrize("place", [1, 2, 3])
@pytest.mark.parametrize("kind", MIXERS)
def test_tokens_mixed_outside_the_attention(kind, place, read):
    model = seeded(Mixed, MIXERS[kind], place, read)
    if (place, read) == (3, "class") and kind in HARMLESS:
        expected = reference(model, pictures(), grid=(4, 4))
        assert relative_error(gmar(model, pictures()).heatmaps, expected.heatmaps) < 1e-5
        return
    with pytest.raises(
        UnsupportedModelError, match=r"mixe|order|computed by hand|different weights|do not come"
    ):
        gmar(model, pictures())


@pytest.mark.parametrize("place", [0, 1, 2, 3])
@pytest.mark.parametrize("kind", ROWWISE)
def test_what_changes_each_token_by_itself_is_exact(kind, place):
    model = seeded(Mixed, ROWWISE[kind], place)
    for rollout in ("paper", "gradient"):
        expected = reference(model, pictures(), rollout=rollout, grid=(4, 4))
        assert relative_error(gmar(model, pictures(), rollout=rollout).heatmaps, expected.heatmaps) < 1e-5


@pytest.mark.parametrize(
    "kind", ["attention by its operator", "exponential attention", "traced attention", "linear attention"]
)
def test_a_hidden_first_layer(kind):
    with pytest.raises(UnsupportedModelError, match=r"outside the attention, before blocks.0.attn"):
        gmar(seeded(Mixed, MIXERS[kind], 0), pictures())


# How the tokens are pooled ----------------------------------------------------------------------------------


class Pooled(ViT):
    """A ViT whose tokens are pooled by a function of `(model, tokens)`."""

    def __init__(self, pool, **options):
        super().__init__(**options)
        self.pool, self.weights = pool, nn.Parameter(torch.rand(17, 1))
        self.score = nn.Linear(DIM, 1)

    def forward(self, images):
        return self.head(self.pool(self, self.features(images)))


def rms(x):
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


UNEQUAL = {
    "fixed weights": lambda m, x: (x * torch.linspace(0.1, 1, 17)[:, None]).mean(1),
    "learned weights": lambda m, x: (m.weights.sigmoid() * x).sum(1),
    "sigmoid gate": lambda m, x: (x * m.score(x).sigmoid()).mean(1),
    "gate divided out": lambda m, x: (x / (1 + m.score(x).exp())).mean(1),
    "normalised gate": lambda m, x: (x * m.score(x).sigmoid()).sum(1) / m.score(x).sigmoid().sum(1),
    "attention pooling by hand": lambda m, x: (m.score(x).softmax(1) * x).sum(1),
    "GeM": lambda m, x: x.clamp(min=1e-6).pow(3).mean(1).pow(1 / 3),
    "GeM by hand": lambda m, x: (x * x * x).mean(1),
    "exponential": lambda m, x: x.exp().mean(1).log(),
    "log-sum-exp": lambda m, x: x.logsumexp(1),
    "einsum": lambda m, x: torch.einsum("nk,bnc->bc", m.weights, x),
    "channel gate": lambda m, x: (x * x.sigmoid()).mean(1),
}


@pytest.mark.parametrize("kind", UNEQUAL)
def test_pools_with_weights_are_refused(kind):
    with pytest.raises(UnsupportedModelError, match=r"different weights|tokens are mixed|mixes the tokens"):
        gmar(seeded(Pooled, UNEQUAL[kind]), pictures())


SOME = torch.arange(17) % 3 != 1
MASKED = {
    "multiplied": lambda m, x: (x * SOME[:, None]).sum(1) / SOME.sum(),
    "expanded": lambda m, x: (x * SOME[:, None].expand(x.shape[1:]).float()).sum(1) / SOME.sum(),
    "filled": lambda m, x: x.masked_fill(~SOME[:, None], 0).sum(1) / SOME.sum(),
    "chosen": lambda m, x: x[:, SOME].mean(1),
    "matrix": lambda m, x: (SOME.float() / SOME.sum()) @ x,
    "after a projection": lambda m, x: m.score.weight * (rms(x) * SOME[:, None]).mean(1),
}


@pytest.mark.parametrize("rollout", ["paper", "gradient"])
@pytest.mark.parametrize("kind", MASKED)
def test_mean_over_some_tokens(kind, rollout):
    model, rows = seeded(Pooled, MASKED[kind]), SOME / SOME.sum()
    expected = reference(model, pictures(), read=rows, rollout=rollout, grid=(4, 4))
    assert relative_error(gmar(model, pictures(), rollout=rollout).heatmaps, expected.heatmaps) < 1e-5


class PaddedMean(nn.Module):
    """A text encoder with a masked mean, as sentence encoders have it."""

    def __init__(self):
        super().__init__()
        self.words, self.norm = nn.Embedding(30, DIM), nn.LayerNorm(DIM)
        self.blocks = nn.ModuleList(MaskedBlock() for _ in range(3))
        self.head = nn.Linear(DIM, 5)

    def forward(self, input_ids, attention_mask):
        x = self.words(input_ids)
        for block in self.blocks:
            x = block(x, attention_mask[:, None, None].bool())
        mask = attention_mask[..., None].float()
        return self.head((rms(self.norm(x)) * mask).sum(1) / mask.sum(1))


class MaskedBlock(Block):
    def forward(self, x, mask):
        self.attn.options = {"attn_mask": mask}
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def test_padded_row_equals_the_text_alone():
    model, lengths = seeded(PaddedMean), (9, 6, 4)
    ids = torch.randint(1, 30, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(9) < torch.tensor(lengths)[:, None]).long()
    together = gmar(model, {"input_ids": ids, "attention_mask": mask}, rollout="paper")
    for index, length in enumerate(lengths):
        alone = {"input_ids": ids[[index], :length], "attention_mask": mask[[index], :length]}
        found = gmar(model, alone, rollout="paper")
        assert relative_error(together.heatmaps[index, :length], found.heatmaps[0]) < 1e-5
        assert relative_error(together.importance[index], found.importance[0]) < 1e-5
