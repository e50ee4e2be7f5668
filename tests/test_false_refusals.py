"""Models that were refused for a false reason, or crashed: exact now, or refused with what is true of them."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from gmar_lightning import UnsupportedModelError, gmar, targets
from tests.helpers.materialised import map_gradients, per_head
from tests.helpers.networks import CLASSES, DIM, HEADS, Attention, ViT, pictures, seeded
from tests.helpers.reference import reference, relative_error


def largest(output):
    return output.amax(-1)


def assert_heads_exact(model, images, target=None, score=largest):
    found = gmar(model, images, target)
    for layer, (importance, contribution) in enumerate(
        per_head(map_gradients(model, images, score), 2, "bh")
    ):
        assert relative_error(found.importance[:, layer], importance) < 1e-5
        assert relative_error(found.contribution[:, layer], contribution) < 1e-5
    return found


class Suffixed(ViT):
    """Tokens without a part in the image in front of the patches and behind them."""

    def __init__(self, prefix, suffix, read):
        super().__init__(prefix=prefix)
        self.behind = nn.Parameter(torch.randn(1, suffix, DIM))
        self.read = torch.zeros(prefix + 16 + suffix)
        self.read[read] = 1
        self.read /= self.read.sum()

    def forward(self, images):
        x = torch.cat([self.tokens(images), self.behind.expand(len(images), -1, -1)], 1)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, self.read > 0].mean(1))


@pytest.mark.parametrize(
    ("prefix", "suffix", "read"),
    [
        (1, 4, 0),
        (1, 4, slice(1, 17)),
        (0, 3, slice(0, 16)),
        (0, 5, slice(16, 21)),
        (2, 100, -1),
        (70, 0, 0),
        (200, 1, slice(200, 216)),
    ],
)
def test_tokens_in_front_and_behind_however_many(prefix, suffix, read):
    model = seeded(Suffixed, prefix, suffix, read)
    for form in ("gradient", "paper"):
        expected = reference(model, pictures(), read=model.read, rollout=form).row[:, prefix : prefix + 16]
        found = gmar(model, pictures(), rollout=form)
        assert found.scope == "whole"
        assert relative_error(found.heatmaps, expected.reshape(2, 4, 4)) < 1e-5


class ModifiedResNet(nn.Module):
    """A CLIP network of convolutions with an attention pool that may return more than what is read."""

    def __init__(self, returned):
        super().__init__()
        self.body = nn.Conv2d(3, DIM, 8, 8)
        self.pool, self.head = nn.MultiheadAttention(DIM, HEADS), nn.Linear(DIM, CLASSES)
        self.returned = returned

    def pooled(self, x):
        x = x.flatten(2).permute(2, 0, 1)
        x = torch.cat([x.mean(0, keepdim=True), x], 0)
        output, _ = self.pool(x if self.returned == "all" else x[:1], x, x, need_weights=False)
        return output[0], x

    def forward(self, images):
        return self.head(self.pooled(self.body(images))[0])


@pytest.mark.parametrize("returned", ["one", "all"])
def test_attention_pools_that_return_tuples(returned):
    found = assert_heads_exact(seeded(ModifiedResNet, returned), pictures())
    if returned == "one":
        assert "attends from 1 queries to 17 keys" in found.scope
    else:
        expected = reference(seeded(ModifiedResNet, returned), pictures(), grid=(4, 4))
        assert relative_error(found.heatmaps, expected.heatmaps) < 1e-5


class PoolWithoutPrefix(ViT):
    def __init__(self):
        super().__init__(prefix=4)
        self.query = nn.Parameter(torch.randn(1, 1, DIM))
        self.pool = nn.MultiheadAttention(DIM, HEADS, batch_first=True)

    def forward(self, images):
        x = self.features(images)[:, 4:]
        return self.head(self.pool(self.query.expand(len(x), -1, -1), x, x, need_weights=False)[0][:, 0])


def test_a_pool_that_skips_the_prefix():
    found = assert_heads_exact(seeded(PoolWithoutPrefix), pictures())
    assert "token count changes at layer 3: pool (MultiheadAttention) sees 16 tokens after 20" in found.scope


class MoreKeys(Attention):
    """Keys and values of no token, as in prefix tuning and learned sinks."""

    def __init__(self):
        super().__init__()
        self.keys, self.values = (nn.Parameter(torch.randn(1, HEADS, 2, DIM // HEADS)) for _ in range(2))

    def forward(self, x):
        q, k, v = self.qkv(x)
        k, v = (
            torch.cat([e.expand(len(x), -1, -1, -1), t], 2) for e, t in ((self.keys, k), (self.values, v))
        )
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_more_keys_than_queries():
    found = assert_heads_exact(seeded(ViT, attention=MoreKeys), pictures())
    assert "keys of no token (sinks, prefix tuning)" in found.scope


class Router(nn.Module):
    """Four experts, weighed for each token and head by itself."""

    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(DIM, 12), nn.Linear(DIM, 4 * DIM)

    def forward(self, x):
        weights = self.gate(x).unflatten(-1, (3, 4)).softmax(-1)
        experts = self.experts(x).unflatten(-1, (3, 4, 8))
        return x + (weights[..., None] * experts).sum(-2).flatten(2)


class Routed(ViT):
    def __init__(self, place):
        super().__init__()
        self.router, self.place = Router(), place

    def forward(self, images):
        x = self.tokens(images)
        for index, block in enumerate(self.blocks):
            x = block(x)
            x = self.router(x) if index == self.place else x
        return self.head(self.norm(x)[:, 0])


@pytest.mark.parametrize("place", [0, 2])
def test_a_router_with_four_axes(place):
    model = seeded(Routed, place)
    expected = reference(model, pictures(), grid=(4, 4))
    assert relative_error(gmar(model, pictures()).heatmaps, expected.heatmaps) < 1e-5


class Distilled(nn.Module):
    def __init__(self, first):
        super().__init__()
        self.student, self.teacher, self.first = ViT(), ViT(), first

    def forward(self, images):
        logits = None if self.first else self.student(images)
        with torch.no_grad():
            self.seen = self.teacher(images)
        return self.student(images) if logits is None else logits


@pytest.mark.parametrize("first", [True, False])
def test_a_frozen_teacher(first):
    model = seeded(Distilled, first)
    torch.testing.assert_close(gmar(model, pictures()).heatmaps, gmar(model.student, pictures()).heatmaps)


class Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v)
        return F.scaled_dot_product_attention(q, k, v)

    @staticmethod
    def backward(ctx, grad):
        given = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
        with torch.enable_grad():
            return torch.autograd.grad(F.scaled_dot_product_attention(*given), given, grad)


class ByHand(Fused):
    @staticmethod
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v)
        return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v


class Mixes(Attention):
    """Attention whose product is computed by a function of queries, keys and values."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.proj(self.function(*self.qkv(x)).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("function", [Fused, ByHand])
def test_a_custom_function(function, layers):
    model = seeded(ViT)
    for block in model.blocks[:layers]:
        block.attn = seeded(Mixes, function.apply)
    with pytest.raises(UnsupportedModelError, match=r"inside a custom autograd\.Function"):
        gmar(model, pictures())


@pytest.mark.parametrize("part", [{nn.Linear}, {"blocks.0.mlp.0"}])
def test_dynamic_quantisation(part):
    model = torch.ao.quantization.quantize_dynamic(seeded(ViT), part, dtype=torch.qint8)
    with pytest.raises(UnsupportedModelError, match=r"blocks.0.* computes in integers \(int8"):
        gmar(model, pictures())


def by_hand(q, k, v):
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v


@pytest.mark.parametrize("function", [F.scaled_dot_product_attention, by_hand])
def test_vmap(function):
    with pytest.raises(UnsupportedModelError, match=r"attends inside torch.vmap"):
        gmar(seeded(ViT, attention=lambda: Mixes(torch.vmap(function))), pictures())


def test_flex_attention_on_a_cpu():
    from torch.nn.attention.flex_attention import flex_attention

    with pytest.raises(
        UnsupportedModelError, match=r"the model runs, but not with gradients.*backward on CPU"
    ):
        gmar(seeded(ViT, attention=lambda: Mixes(flex_attention)), pictures())


def test_soft_capped_attention():
    config = transformers.Gemma2Config(
        vocab_size=50, hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=3, head_dim=8, num_labels=3, pad_token_id=0, attn_implementation="eager",
    )  # fmt: skip
    model = seeded(transformers.Gemma2ForSequenceClassification, config)
    with pytest.raises(UnsupportedModelError, match=r"the model runs, but .*softcap"):
        gmar(model, {"input_ids": torch.randint(1, 50, (2, 9))})


def test_an_error_of_the_model_itself_stays():
    class Wrong(ViT):
        def forward(self, images):
            raise ValueError("no images today")

    with pytest.raises(ValueError, match="no images today"):
        gmar(seeded(Wrong), pictures())


class Dense(ViT):
    """A logit map over the patches."""

    def __init__(self, enlarged):
        super().__init__()
        self.enlarged = enlarged

    def forward(self, images):
        maps = self.head(self.features(images))[:, 1:].mT.unflatten(-1, (4, 4))
        return F.interpolate(maps, scale_factor=8, mode="bilinear") if self.enlarged else maps


@pytest.mark.parametrize("enlarged", [True, False])
def test_mask_logit_without_a_mask(enlarged):
    model, target = seeded(Dense, enlarged), targets.MaskLogit(2)
    found = assert_heads_exact(model, pictures(), target, target)
    if enlarged:
        assert "different weights" in found.scope
        return
    chosen = model(pictures()).argmax(1).eq(2).flatten(1).float()
    assert 0 < chosen.mean() < 1
    rows = torch.zeros(2, 17)
    rows[:, 1:] = chosen / chosen.sum(-1, keepdim=True)
    maps = map_gradients(model, pictures(), target)
    row = rows[:, None]
    for attention, grad in reversed(maps):
        share = grad.abs().sum((-2, -1))
        share = (share / share.sum(-1, keepdim=True))[:, :, None, None]
        row = row + row @ (share * (attention * grad).clamp(min=0)).sum(1)
    assert relative_error(found.heatmaps, row[:, 0, 1:].reshape(2, 4, 4)) < 1e-5
