"""Signals read off a training step against plain autograd on materialised maps, and the step stays the same."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from gmar_lightning import UnsupportedModelError
from gmar_lightning.explain.training_step import StepReader
from tests.helpers.networks import CLASSES, Attention, ViT, pictures, seeded
from tests.helpers.reference import materialised
from tests.helpers.tiny import vit


class Checkpointed(ViT):
    reentrant = False

    def features(self, images):
        x = self.tokens(images)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.norm(x)


class Reentrant(Checkpointed):
    reentrant = True


class TorchMHA(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 24, 8, 8)
        layer = nn.TransformerEncoderLayer(24, 3, 48, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(24, CLASSES)

    def forward(self, images):
        return self.head(self.encoder(self.patches(images).flatten(2).mT).mean(1))


MODELS = {
    "plain": lambda: seeded(ViT),
    "grouped keys": lambda: seeded(ViT, key_heads=1, enable_gqa=True),
    "checkpointed": lambda: seeded(Checkpointed),
    "reentrant": lambda: seeded(Reentrant),
    "multi-head attention": lambda: seeded(TorchMHA),
    "timm": lambda: seeded(vit),
}


def loss_of(model, images, labels):
    return F.cross_entropy(model(images), labels)


@pytest.mark.parametrize("name", MODELS)
def test_signals_equal_autograd_on_materialised_maps(name):
    model = MODELS[name]().double().train()
    size = 16 if name == "timm" else 32
    images = pictures(3, size, size).double()
    labels = torch.tensor([0, 1, 3])
    reader = StepReader(model)
    with reader.watching():
        loss_of(model, images, labels).backward()
    found = reader.signals()
    assert found is not None

    plain, maps = copy.deepcopy(model), []
    for part in plain.modules():
        if isinstance(part, Checkpointed):
            part.__class__ = ViT
    with materialised(maps):
        losses = F.cross_entropy(plain(images), labels, reduction="none")
        grads = torch.autograd.grad(losses.sum(), maps)
    for layer, (attention, grad) in enumerate(zip(maps, grads, strict=True)):
        norm = grad.square().sum((-2, -1)).sqrt().mean(0)
        part = (grad * attention).sum((-2, -1)).abs().mean(0)  # sum dO * O = sum A * dA
        torch.testing.assert_close(found.importance[layer], norm, rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(found.contribution[layer], part, rtol=1e-10, atol=1e-14)
    assert len(found.layers) == len(maps)
    assert len(set(found.layers)) == len(maps)
    assert reader.signals() is None


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_the_step_stays_bit_identical(name, autocast):
    size = 16 if name == "timm" else 32
    images, labels = pictures(3, size, size), torch.tensor([0, 1, 3])
    models = [MODELS[name]().train() for _ in range(2)]
    for watch, model in zip((False, True), models, strict=True):
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        for _ in range(2):
            reader = StepReader(model)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                if watch:
                    with reader.watching():
                        loss_of(model, images, labels).backward()
                    assert reader.signals() is not None
                else:
                    loss_of(model, images, labels).backward()
            optimizer.step()
            optimizer.zero_grad()
    for one, other in zip(models[0].state_dict().values(), models[1].state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_accumulated_batches_are_averaged_and_the_factor_undoes_the_scale():
    model = seeded(ViT).double()
    images, labels = pictures(4).double(), torch.tensor([0, 1, 2, 3])
    whole, parts = StepReader(model), StepReader(model)
    with whole.watching():
        loss_of(model, images, labels).backward()
    with parts.watching():
        for rows in (slice(0, 2), slice(2, 4)):
            (loss_of(model, images[rows], labels[rows]) / 2).backward()
    expected, found = whole.signals(), parts.signals(factor=2)
    torch.testing.assert_close(found.importance, expected.importance)
    torch.testing.assert_close(found.contribution, expected.contribution)


def test_nothing_stays_behind():
    model, function = seeded(ViT), F.scaled_dot_product_attention
    with pytest.raises(RuntimeError), StepReader(model).watching():
        model(pictures(height=40))  # positions for another grid
    assert F.scaled_dot_product_attention is function
    assert not torch.nn.modules.module._global_forward_pre_hooks


def test_compiled_models_are_refused_by_name():
    model = seeded(ViT)
    model.blocks[1].compile(backend="eager")
    with pytest.raises(UnsupportedModelError, match=r"blocks\.1 is compiled"):
        StepReader(model)


def test_a_layer_without_gradient_is_left_out():
    class Frozen(ViT):
        def features(self, images):
            x = self.tokens(images)
            with torch.no_grad():
                x = self.blocks[0](x)
            for block in self.blocks[1:]:
                x = block(x)
            return self.norm(x)

    model = seeded(Frozen, attention=Attention)
    reader = StepReader(model)
    with reader.watching():
        loss_of(model, pictures(), torch.tensor([0, 1])).backward()
    assert reader.signals().layers == ("blocks.1.attn", "blocks.2.attn")
