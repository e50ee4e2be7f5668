"""What is accepted is exact: every class of a plausible wrong picture, refused or shown against a reference."""

import pytest

from gmar_lightning import UnsupportedModelError, gmar
from tests.helpers.mixers import MIXERS, ROWWISE
from tests.helpers.networks import ViT, pictures, seeded
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
