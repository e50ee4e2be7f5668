"""Whatever state training left a model in: the same explanation, and no trace of it."""

import pytest
import timm
import torch
import transformers
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

from gmar_lightning import gmar
from tests.helpers.networks import CLASSES, Attention, Block, ViT, pictures, seeded
from tests.helpers.reference import reference, relative_error

SMALL = {"embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": CLASSES, "img_size": 32, "patch_size": 8}


def small_timm(**options):
    return seeded(timm.create_model, "vit_tiny_patch16_224", **{**SMALL, **options})


def assert_same(found, expected, tolerance=1e-5):
    assert relative_error(found.heatmaps, expected.heatmaps) < tolerance
    assert relative_error(found.importance, expected.importance) < tolerance


def test_train_mode_with_dropout_and_drop_path():
    model = small_timm(drop_rate=0.3, attn_drop_rate=0.3, proj_drop_rate=0.3, drop_path_rate=0.3)
    expected = gmar(model, pictures())
    model.train()
    assert_same(gmar(model, pictures()), expected, 1e-9)
    assert model.training
    assert model.blocks[1].attn.attn_drop.training


@pytest.mark.parametrize("what", ["backbone", "everything", "embedding"])
def test_frozen(what):
    model = small_timm()
    expected = gmar(model, pictures())
    for name, parameter in model.named_parameters():
        frozen = {"backbone": "head" not in name, "everything": True, "embedding": "embed" in name}[what]
        parameter.requires_grad_(not frozen)
    before = [p.requires_grad for p in model.parameters()]
    assert_same(gmar(model, pictures()), expected)
    assert [p.requires_grad for p in model.parameters()] == before


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_under_no_grad_and_inference_mode(context):
    model = small_timm()
    expected = gmar(model, pictures(), torch.tensor([1, 2]))
    with context():
        images, targets = pictures() + 0, torch.tensor([1, 2]) + 0
        found = gmar(model, images, targets)
        assert torch.is_inference_mode_enabled() == (context is torch.inference_mode)
        assert not torch.is_grad_enabled()
    assert_same(found, expected)
    assert_same(gmar(model, images, targets), expected)


def trained_step(model, images):
    model.train()
    model.zero_grad()
    model(images).square().sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("style", ["module", "in place", "per block", "full graph", "around"])
def test_compiled_without_a_new_graph(style):
    torch._dynamo.reset()
    counter = CompileCounter()
    plain, images = small_timm(), pictures()
    expected = gmar(plain, images)
    if style == "module":
        model = torch.compile(plain, backend=counter)
    elif style == "full graph":
        model = torch.compile(plain, backend=counter, fullgraph=True)
    elif style == "in place":
        plain.compile(backend=counter)
        model = plain
    elif style == "per block":
        for block in plain.blocks:
            block.compile(backend=counter)
        model = plain
    else:
        wrapper = nn.Module()
        wrapper.net = plain
        wrapper.forward = plain.forward
        model = torch.compile(nn.Sequential(plain), backend=counter)
    before = trained_step(model, images)
    graphs = counter.frame_count
    assert graphs > 0
    assert_same(gmar(model, images), expected)
    assert all("_orig_mod" not in name for name in gmar(model, images).layers)
    after = trained_step(model, images)
    assert counter.frame_count == graphs
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    torch._dynamo.reset()


class Checkpointed(ViT):
    def __init__(self, reentrant):
        super().__init__()
        self.reentrant = reentrant

    def forward(self, images):
        x = self.tokens(images)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(self.norm(x)[:, 0])


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant, frozen):
    model = seeded(Checkpointed, reentrant).requires_grad_(not frozen)
    assert_same(gmar(model, pictures()), gmar(seeded(ViT), pictures()))


def test_checkpointed_mean_head_and_attention_weights():
    class Weights(Block):
        def __init__(self):
            super().__init__(nn.MultiheadAttention(24, 3, batch_first=True))

        def forward(self, x):
            y = self.norm1(x)
            y, weights = self.attn(y, y, y, need_weights=True)
            assert weights.shape == (len(x), 17, 17)
            return x + y + self.mlp(self.norm2(x))

    class Model(Checkpointed):
        def __init__(self, on):
            super().__init__(False)
            self.blocks, self.on = nn.ModuleList(Weights() for _ in range(3)), on

        def forward(self, images):
            x = self.tokens(images)
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False) if self.on else block(x)
            return self.head(self.norm(x).mean(1))

    assert_same(gmar(seeded(Model, True), pictures()), gmar(seeded(Model, False), pictures()))


@pytest.mark.parametrize("frozen", [True, False])
def test_timm_checkpointing(frozen):
    model = small_timm().requires_grad_(not frozen)
    expected = gmar(model, pictures())
    model.set_grad_checkpointing()
    assert_same(gmar(model, pictures()), expected)
    assert model.grad_checkpointing


def test_hugging_face_checkpointing():
    config = transformers.ViTConfig(
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=96,
        image_size=32,
        patch_size=8,
    )
    model = seeded(transformers.ViTForImageClassification, config)
    expected = gmar(model, pictures())
    model.train()
    for reentrant in (True, False):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        assert_same(gmar(model, pictures()), expected)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_low_precision(dtype, tolerance):
    model, images = small_timm(), pictures()
    expected = gmar(model, images, torch.tensor([0, 1]))
    with torch.autocast("cpu", dtype=dtype):
        found = gmar(model, images, torch.tensor([0, 1]))
        assert torch.is_autocast_enabled("cpu")
        assert torch.is_autocast_cache_enabled()
    for result in (found, gmar(small_timm().to(dtype), images, torch.tensor([0, 1]))):
        for name in ("heatmaps", "importance", "head_weights", "logits"):
            assert getattr(result, name).dtype == torch.float32
        assert_same(result, expected, tolerance)
        assert result.heatmaps.isfinite().all()


def test_double_precision_against_the_reference():
    model, images = small_timm().double(), pictures().double()
    found, expected = gmar(model, images), reference(model, images, grid=(4, 4))
    assert relative_error(found.heatmaps, expected.heatmaps) < 1e-10
    assert relative_error(found.importance, torch.stack(expected.importance, 1)) < 1e-10
    assert_same(gmar(model, pictures()), found, 1e-6)  # float32 images


def test_classifier_inside_another_module():
    class Trained(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.ModuleDict({"vit": ViT()})

        def forward(self, batch):
            raise RuntimeError("the forward of training")

    model = seeded(Trained).train()
    found = gmar(model, pictures(), module="net.vit")
    assert_same(found, gmar(model.net["vit"], pictures()), 1e-9)
    assert found.layers[0] == "blocks.0.attn"
    assert model.training
    assert model.net["vit"].training


def test_non_square_images():
    model = seeded(ViT, grid=(2, 6))
    images = pictures(3, 16, 48)
    found, expected = gmar(model, images, signals=True), reference(model, images, grid=(2, 6))
    assert relative_error(found.heatmaps, expected.heatmaps) < 1e-5
    assert (found.signals["distance"] < 5.1).all()


def test_dropout_in_the_call_is_left_out():
    """A constant dropout_p drops attention in evaluation mode too; the explanation is of the model without it."""
    model = seeded(ViT, attention=Attention, dropout_p=0.5)
    assert_same(gmar(model, pictures()), gmar(seeded(ViT), pictures()), 1e-9)
