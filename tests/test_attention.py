"""Interception: every way of calling attention is seen, named, computed as before, and put back."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as bound_elsewhere
from torch.nn.modules import module as module_hooks
from torch.overrides import _get_current_function_mode_stack

from gmar_lightning import UnsupportedModelError, gmar, record_attention
from gmar_lightning.explain.intercept import intercept_attention
from tests.helpers.networks import CLASSES, DIM, Attention, Block, Tokens, ViT, pictures, seeded
from tests.helpers.reference import reference, relative_error

FUSED = F.scaled_dot_product_attention
MULTI_HEAD = F.multi_head_attention_forward


def assert_exact(model, images, **how):
    how = {"grid": (4, 4), **how}
    found, expected = gmar(model, images), reference(model, images, **how)
    assert relative_error(found.heatmaps, expected.heatmaps) < 1e-5
    assert relative_error(found.importance, torch.stack(expected.importance, 1)) < 1e-5


def test_calls_in_forward_order_with_names_and_outputs():
    model, images = seeded(ViT), pictures()
    expected = model(images)
    with record_attention(model) as calls:
        logits = model(images)
        grads = torch.autograd.grad(logits[:, 3].sum(), [call.output for call in calls])
    assert torch.equal(logits, expected)
    assert [call.name for call in calls] == [f"blocks.{i}.attn" for i in range(3)]
    assert [call.owner for call in calls] == ["Attention"] * 3
    assert [call.depth for call in calls] == [0, 1, 2]
    for call, grad in zip(calls, grads, strict=True):
        assert (
            call.q.shape == call.k.shape == call.v.shape == call.output.shape == grad.shape == (2, 3, 17, 8)
        )
        assert call.scale == 8**-0.5
        assert not call.q.requires_grad
        torch.testing.assert_close(call.attention() @ call.v, call.output)
        torch.testing.assert_close(call.attention(slice(3, 5)), call.attention()[:, :, 3:5])


def test_recording_without_gradients():
    model = seeded(ViT)
    with torch.no_grad(), record_attention(model) as calls:
        model(pictures())
    assert len(calls) == 3
    assert not any(call.output.requires_grad for call in calls)


class Elsewhere(Attention):
    def forward(self, x):
        return self.proj(bound_elsewhere(*self.qkv(x)).transpose(1, 2).flatten(2))


class Positional(Attention):
    def forward(self, x):
        x = F.scaled_dot_product_attention(*self.qkv(x), None, 0.0, True)
        return self.proj(x.transpose(1, 2).flatten(2))


class Masked(Attention):
    def __init__(self, kind):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        noise = torch.randn(1, 3, 17, 17, generator=generator)
        mask = {
            "boolean": noise[0, 0] > -0.5,
            "additive": noise,
            "smallest number": torch.zeros(1, 1, 1, 17).masked_fill(
                noise[:, :1, :1] < -0.5, torch.finfo().min
            ),
            "keys": noise[:, :, :1],
        }[kind]
        if mask.dtype == torch.bool:
            mask = mask | torch.eye(17, dtype=torch.bool)
        self.register_buffer("mask", mask)

    def forward(self, x):
        x = F.scaled_dot_product_attention(*self.qkv(x), attn_mask=self.mask)
        return self.proj(x.transpose(1, 2).flatten(2))


class LearnedBias(Attention):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.randn(1, 3, 17, 17))

    def forward(self, x):
        x = F.scaled_dot_product_attention(*self.qkv(x), attn_mask=self.bias)
        return self.proj(x.transpose(1, 2).flatten(2))


def test_name_bound_elsewhere():
    assert_exact_without_swap(seeded(ViT, attention=Elsewhere), seeded(ViT))


def assert_exact_without_swap(model, same):
    """The reference swaps the name, which this model does not use: compare with a twin that does."""
    same.load_state_dict(model.state_dict())
    images = pictures()
    torch.testing.assert_close(model(images), same(images))
    expected = reference(same, images, grid=(4, 4))
    assert relative_error(gmar(model, images).heatmaps, expected.heatmaps) < 1e-5
    with record_attention(model) as calls:
        model(images)
    assert [call.name for call in calls] == [f"blocks.{i}.attn" for i in range(3)]


def test_causal_by_position():
    rows = torch.zeros(17)
    rows[-1] = 1
    assert_exact(seeded(LastToken, attention=Positional), pictures(), read=rows)
    assert (gmar(seeded(ViT, attention=Positional), pictures()).heatmaps == 0).all()


class LastToken(ViT):
    def forward(self, images):
        return self.head(self.features(images)[:, -1])


@pytest.mark.parametrize("kind", ["boolean", "additive", "smallest number", "keys"])
def test_masks(kind):
    assert_exact(seeded(ViT, attention=Masked, kind=kind), pictures())


def test_learned_bias_scale_and_grouped_heads():
    assert_exact(seeded(ViT, attention=LearnedBias), pictures())
    assert_exact(seeded(ViT, attention=Attention, scale=1.0), pictures())
    assert_exact(seeded(ViT, attention=Attention, heads=6, key_heads=2, enable_gqa=True), pictures())
    causal = seeded(LastToken, attention=Attention, heads=6, key_heads=2, enable_gqa=True, is_causal=True)
    rows = torch.zeros(17)
    rows[-1] = 1
    assert_exact(causal, pictures(), read=rows)


def test_attention_inlined_in_one_forward():
    class Inlined(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens = Tokens()
            self.qkv = nn.ParameterList(torch.randn(DIM, 3 * DIM) * 0.2 for _ in range(3))
            self.out = nn.ParameterList(torch.randn(DIM, DIM) * 0.2 for _ in range(3))
            self.head = nn.Linear(DIM, CLASSES)

        def forward(self, images):
            x = self.tokens(images)
            for qkv, out in zip(self.qkv, self.out, strict=True):
                parts = (F.layer_norm(x, (DIM,)) @ qkv).unflatten(-1, (3, 3, 8)).permute(2, 0, 3, 1, 4)
                x = x + F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2) @ out
            return self.head(F.layer_norm(x, (DIM,))[:, 0])

    model = seeded(Inlined)
    assert_exact(model, pictures())
    assert gmar(model, pictures()).layers == ("", "", "")


class MultiheadBlock(Block):
    def __init__(self, need_weights, average=True):
        super().__init__(nn.MultiheadAttention(DIM, 3, batch_first=True))
        self.options = {"need_weights": need_weights, "average_attn_weights": average}
        self.weights = None

    def forward(self, x):
        y = self.norm1(x)
        y, self.weights = self.attn(y, y, y, **self.options)
        x = x + y
        return x + self.mlp(self.norm2(x))


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_multihead_attention_and_its_weights(average, frozen):
    def build(need_weights):
        model = ViT()
        model.blocks = nn.ModuleList(MultiheadBlock(need_weights, average) for _ in range(3))
        return model

    images = pictures()
    plain, asking = (seeded(build, need).requires_grad_(not frozen) for need in (False, True))
    expected = reference(plain, images, grid=(4, 4))
    with torch.no_grad():
        asking(images)
    weights = [block.weights.clone() for block in asking.blocks]
    for model in (plain, asking):
        found = gmar(model, images)
        assert relative_error(found.heatmaps, expected.heatmaps) < 1e-5
        assert found.layers == ("blocks.0.attn", "blocks.1.attn", "blocks.2.attn")
    for block, before in zip(asking.blocks, weights, strict=True):
        torch.testing.assert_close(block.weights.detach(), before)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_transformer_encoder_and_its_fast_path(frozen, norm_first):
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens = Tokens()
            layer = nn.TransformerEncoderLayer(DIM, 2, 48, batch_first=True, norm_first=norm_first)
            self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
            self.head = nn.Linear(DIM, CLASSES)

        def forward(self, images):
            return self.head(self.encoder(self.tokens(images))[:, 0])

    model = seeded(Encoder).requires_grad_(not frozen)
    assert_exact(model, pictures())
    assert gmar(model, pictures()).layers[1] == "encoder.layers.1.self_attn"


def test_torchvision_frozen_takes_no_fast_path():
    model = seeded(
        torchvision.models.VisionTransformer,
        image_size=32,
        patch_size=8,
        num_layers=2,
        num_heads=2,
        hidden_dim=24,
        mlp_dim=48,
        num_classes=CLASSES,
    ).requires_grad_(False)
    nn.init.normal_(model.heads.head.weight)
    assert_exact(model, pictures())


def small_timm(**options):
    options = {"embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": CLASSES, "img_size": 32, **options}
    return seeded(timm.create_model, "vit_tiny_patch16_224", patch_size=8, **options)


def test_timm_without_the_fused_kernel():
    fused, images = small_timm(), pictures()
    expected = gmar(fused, images)
    for module in fused.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    fused.blocks[1].attn.fused_attn = True
    found = gmar(fused, images)
    assert torch.equal(found.heatmaps, expected.heatmaps)
    assert [block.attn.fused_attn for block in fused.blocks] == [False, True, False]
    assert "fused_attn" not in vars(type(fused.blocks[0].attn))


@pytest.mark.parametrize("value", ["0"])
def test_timm_with_the_environment_switch(value):
    code = (
        "import torch, timm; from gmar_lightning import gmar;"
        "m = timm.create_model('test_vit', num_classes=5).eval();"
        "assert not m.blocks[0].attn.fused_attn;"
        "assert gmar(m, torch.randn(1, 3, 160, 160)).heatmaps.shape == (1, 10, 10);"
        "assert not m.blocks[0].attn.fused_attn"
    )
    environment = {**os.environ, "TIMM_FUSED_ATTN": value, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=Path(__file__).parents[1])


class Broken(Block):
    def __init__(self, failure):
        super().__init__(Attention(48), dim=48)
        self.failure = failure

    def forward(self, x):
        super().forward(x)
        raise self.failure


def left_behind():
    return (
        F.scaled_dot_product_attention is FUSED,
        F.multi_head_attention_forward is MULTI_HEAD,
        torch.backends.mha.get_fastpath_enabled(),
        len(_get_current_function_mode_stack()),
        len(module_hooks._global_forward_hooks),
        len(module_hooks._global_forward_pre_hooks),
        len(module_hooks._global_forward_hooks_always_called),
        torch.utils.checkpoint.CheckpointFunction.__name__,
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
    )


@pytest.mark.parametrize("failure", [RuntimeError("halfway"), KeyboardInterrupt(), SystemExit(3)])
def test_nothing_is_left_behind(failure):
    before = left_behind()
    model = small_timm()
    for block in model.blocks:
        block.attn.fused_attn = False
    gmar(model, pictures())
    assert left_behind() == before
    model.blocks[2] = Broken(failure)
    with pytest.raises(type(failure), check=lambda raised: raised is failure):
        gmar(model, pictures())
    assert left_behind() == before
    assert not model.blocks[0].attn.fused_attn
    with pytest.raises(type(failure)), record_attention(model):
        model(pictures())
    assert left_behind() == before


def test_refusal_leaves_nothing_behind():
    before = left_behind()
    with pytest.raises(UnsupportedModelError):
        gmar(seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4))), pictures())
    assert left_behind() == before


def test_disabled_fast_path_stays_disabled():
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        gmar(seeded(ViT), pictures())
        assert not torch.backends.mha.get_fastpath_enabled()
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_another_thread_is_not_recorded():
    model, other = seeded(ViT), seeded(ViT, seed=3)
    with record_attention(model) as calls:
        thread = threading.Thread(target=other, args=(pictures(),))
        thread.start()
        thread.join()
        model(pictures())
    assert len(calls) == 3


def test_handler_may_change_the_output():
    model, images = seeded(ViT), pictures()
    seen = []

    def silence(call):
        seen.append((call.name, call.q.shape[1]))
        return torch.zeros_like(call.compute())

    with torch.no_grad(), intercept_attention(model, silence):
        silent = model(images)
    assert seen == [(f"blocks.{i}.attn", 3) for i in range(3)]
    assert not torch.allclose(silent, model(images))
