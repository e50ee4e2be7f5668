"""Which token is which: what is read is derived, and what would give a plausible wrong picture is refused."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gmar_lightning import UnsupportedModelError, gmar
from gmar_lightning.explain.readout import readout_rows
from tests.helpers.networks import CLASSES, DIM, Attention, Block, Tokens, ViT, pictures, seeded
from tests.helpers.reference import reference, relative_error


def assert_exact(model, images, **how):
    for rollout in ("paper", "flow", "gradient"):
        found = gmar(model, images, rollout=rollout)
        expected = reference(model, images, rollout=rollout, **how)
        assert found.heatmaps.shape == expected.heatmaps.shape
        assert relative_error(found.heatmaps, expected.heatmaps) < 1e-5
        for layer, importance in enumerate(expected.importance):
            assert relative_error(found.importance[:, layer, : importance.shape[1]], importance) < 1e-5


def heads_alone(model, images, message):
    """No picture, for the reason given; the numbers per head are there."""
    result = gmar(model, images)
    assert result.heatmaps is None
    assert re.search(message, result.scope)
    assert result.importance.isfinite().all()
    return result


def refuse(model, images, message):
    with pytest.raises(UnsupportedModelError, match=message):
        gmar(model, images)


class Changed(ViT):
    """A ViT whose way from tokens to logits is given."""

    def __init__(self, way, head=DIM, **options):
        super().__init__(head=head, **options)
        self.way = way

    def forward(self, images):
        return self.way(self, images)


# What a classifier may read --------------------------------------------------------------------------------


def test_mean_over_patches_and_over_all_tokens():
    patches = seeded(Changed, lambda m, x: m.head(m.features(x)[:, 1:].mean(1)))
    assert_exact(patches, pictures(), read="mean", grid=(4, 4))
    everything = seeded(Changed, lambda m, x: m.head(m.features(x).mean(1)))
    assert_exact(everything, pictures(), read="all", grid=(4, 4))


def test_norm_by_function_after_the_last_module():
    """The last tokens are no module's output; the blocks' output would show a weighted reading."""

    def way(model, images):
        x = model.tokens(images)
        for block in model.blocks:
            x = block(x)
        return model.head(F.layer_norm(x, (DIM,))[:, 1:].mean(1))

    assert_exact(seeded(Changed, way), pictures(), read="mean", grid=(4, 4))


def test_class_token_beside_a_mean():
    def way(model, images):
        x = model.features(images)
        return model.head(torch.cat([x[:, 0], x[:, 1:].mean(1)], -1))

    rows = torch.full((17,), 0.5 / 16)
    rows[0] = 0.5
    assert_exact(seeded(Changed, way, head=2 * DIM), pictures(), read=rows, grid=(4, 4))


def test_two_read_tokens_count_half_each():
    def way(model, images):
        x = model.features(images)
        return (model.head(x[:, 0]) + 3 * model.head(x[:, 1])) / 2

    rows = torch.zeros(18)
    rows[:2] = 0.5
    assert_exact(seeded(Changed, way, prefix=2), pictures(), read=rows, prefix=2, grid=(4, 4))


def test_class_token_behind_the_patches():
    class Suffixed(ViT):
        def forward(self, images):
            x = self.tokens(images).roll(-1, 1)
            for block in self.blocks:
                x = block(x)
            return self.head(self.norm(x)[:, -1])

    rows = torch.zeros(17)
    rows[-1] = 1
    model, images = seeded(Suffixed), pictures()
    expected = reference(model, images, read=rows)
    found = gmar(model, images, signals=True)
    assert relative_error(found.heatmaps, expected.row[:, :16].reshape(2, 4, 4)) < 1e-5
    in_front = gmar(seeded(ViT), images, signals=True)
    torch.testing.assert_close(found.signals["distance"], in_front.signals["distance"], rtol=1e-4, atol=1e-5)


def test_attention_pool():
    class Pool(nn.Module):
        def __init__(self):
            super().__init__()
            self.query = nn.Parameter(torch.randn(1, 1, DIM))
            self.attention = nn.MultiheadAttention(DIM, 3, batch_first=True)

        def forward(self, x):
            return self.attention(self.query.expand(len(x), -1, -1), x, x, need_weights=False)[0][:, 0]

    def way(model, images):
        return model.head(model.norm.pool(model.features(images)))

    def pooled():
        model = Changed(way)
        model.norm.pool = Pool()
        return model

    assert_exact(seeded(pooled), pictures(), read="pool", grid=(4, 4))

    def beside(model, images):
        x = model.features(images)
        return model.head(model.norm.pool(x) + x[:, 0])

    model = seeded(pooled)
    model.way = beside
    refuse(model, pictures(), "logits read more than the tokens")


def test_head_initialised_to_zero():
    for read in ("class", "mean"):
        first = 0 if read == "class" else slice(1, None)

        def way(model, images, first=first):
            x = model.features(images)[:, first]
            return model.head(x if x.ndim == 2 else x.mean(1))

        model, images = seeded(Changed, way), pictures()
        nn.init.zeros_(model.head.weight)
        found = gmar(model, images, rollout=("flow", "gradient"))
        assert (found.importance == 0).all()
        # Without a gradient the gated form is left with its readout row.
        assert (found.maps["gradient"] == (0 if read == "class" else 1 / 16)).all()
        torch.testing.assert_close(found.head_weights, torch.full_like(found.head_weights, 1 / 3))
        expected = reference(model, images, rollout="rollout", read=read, grid=(4, 4))
        assert relative_error(found.heatmaps, expected.heatmaps) < 1e-5


@pytest.mark.parametrize("size", [(32, 32), (16, 48), (40, 24), (8, 16), (8, 8)])
def test_grid_is_live(size):
    class Dynamic(ViT):
        def forward(self, images):
            x = self.tokens.patches(images).flatten(2).mT
            for block in self.blocks:
                x = block(x)
            return self.head(self.norm(x).mean(1))

    model, images = seeded(Dynamic), pictures(2, *size)
    assert_exact(model, images, read="all", prefix=0, grid=(size[0] // 8, size[1] // 8))


def test_patches_cut_without_a_convolution():
    class Unfolded(ViT):
        def __init__(self, known):
            super().__init__()
            self.embed = nn.Linear(3 * 64, DIM)
            if known:
                self.patch_size = 8

        def features(self, images):
            x = self.embed(F.unfold(images, 8, stride=8).mT)
            x = torch.cat([self.tokens.prefix.expand(len(x), -1, -1), x], 1)
            for block in self.blocks:
                x = block(x)
            return self.norm(x)

    for known in (True, False):
        assert_exact(seeded(Unfolded, known), pictures(2, 16, 32), grid=(2, 4))


def test_tokens_first_then_batch():
    class SequenceFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens = Tokens()
            layer = nn.TransformerEncoderLayer(DIM, 3, 48, norm_first=True)
            self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
            self.head = nn.Linear(DIM, CLASSES)

        def forward(self, images):
            return self.head(self.encoder(self.tokens(images).transpose(0, 1))[0])

    assert_exact(seeded(SequenceFirst), pictures(3), grid=(4, 4))


def test_tokens_kept_as_a_map_of_channels_last():
    class ChannelsLast(ViT):
        def forward(self, images):
            x = self.tokens.patches(images).permute(0, 2, 3, 1)
            for block in self.blocks:
                x = x + block.attn(block.norm1(x).flatten(1, 2)).unflatten(1, (4, 4))
                x = x + block.mlp(block.norm2(x))
            return self.head(self.norm(x).mean((1, 2)))

    assert_exact(seeded(ChannelsLast), pictures(), read="all", prefix=0, grid=(4, 4))


# What would be a plausible wrong picture ------------------------------------------------------------------


def test_max_pooling():
    model = seeded(Changed, lambda m, x: m.head(m.features(x)[:, 1:].amax(1)))
    refuse(model, pictures(), "different weights")


def test_two_winners_of_a_max_pool_are_no_two_read_tokens():
    grad = torch.zeros(1, 5, 4)
    grad[0, 2, :2], grad[0, 3, 2:] = 1.0, 2.0
    with pytest.raises(UnsupportedModelError, match="max"):
        readout_rows(grad)


def test_weighted_pooling():
    def way(model, images):
        x = model.features(images)[:, 1:]
        return model.head((x * torch.linspace(0, 1, 16)[:, None]).sum(1))

    refuse(seeded(Changed, way), pictures(), "different weights")


def test_permuted_patches():
    class Permuted(ViT):
        def __init__(self, order):
            super().__init__()
            self.order = order

        def forward(self, images):
            x = self.tokens(images)
            x = torch.cat([x[:, :1], x[:, 1:][:, self.order]], 1)
            for block in self.blocks:
                x = block(x)
            return self.head(self.norm(x)[:, 0])

    torch.manual_seed(0)
    for order in (torch.randperm(16), torch.arange(16).view(4, 4).T.flatten(), torch.arange(15, -1, -1)):
        refuse(seeded(Permuted, order), pictures(), "not the image's patches in reading order")


def test_dropped_tokens():
    class Dropping(ViT):
        def __init__(self, first):
            super().__init__()
            self.first = first

        def forward(self, images):
            x = self.tokens(images)
            for index, block in enumerate(self.blocks):
                x = x[:, :12] if index == self.first else x
                x = block(x)
            return self.head(self.norm(x)[:, 0])

    heads_alone(seeded(Dropping, 1), pictures(), "token count changes at layer 1: blocks.1.attn")
    refuse(seeded(Dropping, 0), pictures(), "tokens dropped|reading order")


def test_grid_of_another_branch_is_not_taken():
    """A convolutional branch runs last before the attention and would give the tokens a grid of 2 x 4."""

    class TwoStems(ViT):
        def __init__(self):
            super().__init__()
            self.side = nn.Conv2d(3, 4, (16, 8), (16, 8))

        def features(self, images):
            x = self.tokens(images)
            self.side(images)
            for block in self.blocks:
                x = block(x)
            return self.norm(x)

    assert_exact(seeded(TwoStems), pictures(), grid=(4, 4))


def test_channel_attention_with_as_many_channels_as_tokens():
    class Channels(ViT):
        def forward(self, images):
            x = self.tokens(images)[:, 1:]  # (batch, 16 tokens, 24 channels)
            x = torch.cat([x, x[:, :8]], 1)  # 24 tokens
            for block in self.blocks:
                x = x + block.attn(block.norm1(x).mT).mT
            return self.head(self.norm(x)[:, 0])

    refuse(seeded(Channels, prefix=1), pictures(), "")


def test_channel_attention_in_a_square_case():
    """Sixteen patches of sixteen channels: only what the tokens depend on tells the axes apart."""

    class Channels(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches = nn.Conv2d(3, 16, 8, 8)
            self.attn = nn.ModuleList(Attention(16, 2) for _ in range(2))
            self.head = nn.Linear(16, CLASSES)

        def forward(self, images):
            x = self.patches(images).flatten(2).mT
            for attn in self.attn:
                x = x + attn(x.mT).mT
            return self.head(x.mean(1))

    refuse(seeded(Channels), pictures(), "")


def test_convolution_between_the_layers():
    class Convolving(ViT):
        def features(self, images):
            x = self.tokens.patches(images).flatten(2).mT
            kernel = self.tokens.patches.weight.new_ones(DIM, 1, 3, 3)
            for block in self.blocks:
                x = block(x)
                x = x + F.conv2d(x.mT.unflatten(-1, (4, 4)), kernel, padding=1, groups=DIM).flatten(2).mT
            return self.norm(x)

        def forward(self, images):
            return self.head(self.features(images).mean(1))

    refuse(seeded(Convolving), pictures(), "mixed outside the attention.*conv2d")


@pytest.mark.parametrize("how", ["linear", "fft", "gate"])
@pytest.mark.parametrize("read", ["class", "mean"])
def test_other_mixing_of_tokens(how, read):
    class Mixing(ViT):
        def __init__(self):
            super().__init__()
            self.mixer = nn.Linear(17, 17)

        def mix(self, x):
            if how == "linear":
                return self.mixer(x.mT).mT
            if how == "fft":
                return torch.fft.fft(x, dim=1).real
            return x * x.mean(1, keepdim=True).sigmoid()

        def forward(self, images):
            x = self.tokens(images)
            for block in self.blocks:
                x = block(x)
                x = x + self.mix(x)
            return self.head(self.norm(x)[:, 0] if read == "class" else self.norm(x).mean(1))

    refuse(seeded(Mixing), pictures(), "mixed outside|mixes the tokens")


def test_attention_by_hand_in_some_layers():
    class ByHand(Attention):
        def forward(self, x):
            q, k, v = self.qkv(x)
            x = (q @ k.mT * self.head_dim**-0.5).softmax(-1) @ v
            return self.proj(x.transpose(1, 2).flatten(2))

    class Linear(Attention):
        def forward(self, x):
            q, k, v = self.qkv(x)
            x = q.relu() @ (k.relu().mT @ v)
            return self.proj(x.transpose(1, 2).flatten(2))

    model = seeded(ViT)
    model.blocks[1].attn = seeded(Linear)
    model.blocks[1].attn.__class__.__name__ = "LinearAttention"
    refuse(model, pictures(), "without calling")
    # A mixed model: the layer by hand is as exact as the fused ones.
    mixed, fused = seeded(ViT), seeded(ViT)
    mixed.blocks[1].attn = seeded(ByHand, seed=1)
    fused.blocks[1].attn = seeded(Attention, seed=1)
    found, expected = gmar(mixed, pictures()), gmar(fused, pictures())
    torch.testing.assert_close(found.heatmaps, expected.heatmaps)
    torch.testing.assert_close(found.importance, expected.importance)


def test_windowed_and_axial_attention():
    class Windowed(Attention):
        def forward(self, x):
            x = x[:, 1:].unflatten(1, (2, 8)).flatten(0, 1)
            x = super().forward(x)
            return F.pad(x.unflatten(0, (-1, 2)).flatten(1, 2), (0, 0, 1, 0))

    heads_alone(seeded(ViT, attention=Windowed), pictures(), r"shape \(4, 3, 8, 8\) for 2 images: windowed")


def test_no_attention_at_all():
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.Flatten(), nn.Linear(64, CLASSES)))
    refuse(model, pictures(), "no attention seen")


def test_backbone_called_twice():
    model = seeded(Changed, lambda m, x: m.head(m.features(x)[:, 0]) + m.head(m.features(x.flip(-1))[:, 0]))
    refuse(model, pictures(), "does not continue the attention layers before it")
    stacked = seeded(
        Changed, lambda m, x: m.head(m.features(torch.cat([x, x.flip(-1)]))[:, 0]).view(2, 2, -1).mean(0)
    )
    refuse(stacked, pictures(), "not sorted by image")


class Ensemble(nn.Module):
    def __init__(self, depth, first=ViT, second=ViT):
        super().__init__()
        self.first, self.second = first(depth), second(depth)

    def forward(self, images):
        return self.first(images) + self.second(images)


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("frozen", [False, True])
def test_two_transformers(depth, frozen):
    model = seeded(Ensemble, depth).requires_grad_(not frozen)
    refuse(model, pictures(), "two transformers|mixed outside|logits read more")
    one = gmar(model, pictures(), module="second")
    assert torch.equal(one.heatmaps, gmar(model.second, pictures()).heatmaps)


def test_convolutional_branch_beside_the_transformer():
    class Cnn(nn.Module):
        def __init__(self, depth):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.Flatten(), nn.Linear(512, CLASSES))

        def forward(self, images):
            return self.body(images)

    for order in ((Cnn, ViT), (ViT, Cnn)):
        refuse(seeded(Ensemble, 2, *order), pictures(), "logits read more|mixed outside")


def test_class_tokens_of_several_layers():
    def way(model, images):
        x, read = model.tokens(images), []
        for block in model.blocks:
            x = block(x)
            read.append(x[:, 0])
        return model.head(model.norm(read[-1] + read[-2]))

    refuse(seeded(Changed, way), pictures(), "several layers")


def test_classifier_reads_an_earlier_layer():
    def way(model, images):
        x = read = model.tokens(images)
        for index, block in enumerate(model.blocks):
            x = block(x)
            read = x if index == 1 else read
        return model.head(model.norm(read)[:, 0])

    refuse(seeded(Changed, way), pictures(), "blocks.2.attn .* do not depend on it|logits read more")


def test_detached_features_are_explained_as_if_they_were_not():
    def detached(model, images):
        return model.head(model.features(images)[:, 0].detach())

    def without_gradient(model, images):
        with torch.no_grad():
            x = model.features(images)
        return model.head(x[:, 0])

    plain = gmar(seeded(ViT), pictures())
    for way in (detached, without_gradient):
        found = gmar(seeded(Changed, way), pictures())
        torch.testing.assert_close(found.heatmaps, plain.heatmaps)
        torch.testing.assert_close(found.importance, plain.importance)


def test_logits_from_returned_attention_weights():
    class Weights(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.head = Tokens(), nn.Linear(DIM, CLASSES)
            self.attention = nn.MultiheadAttention(DIM, 3, batch_first=True)

        def forward(self, images):
            x = self.tokens(images)
            x, weights = self.attention(x, x, x)
            return self.head((weights[:, :1] @ x)[:, 0])

    refuse(seeded(Weights), pictures(), "attention weights")


def test_shared_layers_are_counted_each_time():
    def way(model, images):
        x = model.tokens(images)
        for _ in range(3):
            x = model.blocks[0](x)
        return model.head(model.norm(x)[:, 0])

    model = seeded(Changed, way, depth=1)
    assert_exact(model, pictures(), grid=(4, 4))
    assert gmar(model, pictures()).layers == ("blocks.0.attn",) * 3


def test_parallel_attentions_share_a_depth():
    class Parallel(nn.Module):
        def __init__(self):
            super().__init__()
            self.branches = nn.ModuleList(Block() for _ in range(2))

        def forward(self, x):
            return x + sum(branch(x) for branch in self.branches)

    def parallel():
        model = ViT()
        model.blocks = nn.ModuleList(Parallel() for _ in range(3))
        return model

    assert_exact(seeded(parallel), pictures(), grid=(4, 4), parallel=2)


def test_branches_of_different_length():
    class Uneven(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.three = Block(), Block(), Block()

        def forward(self, x):
            return x + self.two(self.one(x)) + self.three(x)

    model = seeded(ViT)
    model.blocks[1] = seeded(Uneven)
    refuse(model, pictures(), "branches of different length")


def test_difference_of_two_maps():
    class Difference(Attention):
        def forward(self, x):
            q, k, v = self.qkv(x)
            x = F.scaled_dot_product_attention(q, k, v) - 0.5 * F.scaled_dot_product_attention(k, q, v)
            return self.proj(x.transpose(1, 2).flatten(2))

    result = heads_alone(seeded(ViT, attention=Difference), pictures(), "differential attention")
    assert result.layers[:2] == ("blocks.0.attn:0", "blocks.0.attn:1")


def test_parameter_free_pooling():
    def way(model, images):
        x = model.features(images)[:, None]
        return model.head(F.scaled_dot_product_attention(x, x, x)[:, 0, 0])

    refuse(seeded(Changed, way), pictures(), "pools without parameters")


def test_no_logits():
    refuse(seeded(Changed, lambda m, x: m.features(x)), pictures(), r"shape \(2, 17, 24\); expected logits")
    refuse(seeded(Changed, lambda m, x: (m.head(m.features(x)[:, 0]), x)), pictures(), "returned tuple")
