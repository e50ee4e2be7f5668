"""Ablating a head as it is computed against removing it from the weights."""

import copy

import pytest
import timm
import torch
from torch import nn

from gmar_lightning.explain.ablation import ablate_heads


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=48, depth=3, num_classes=5).eval()
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.mul_(2)
    return vit


@pytest.fixture(scope="module")
def images():
    torch.manual_seed(1)
    return torch.randn(4, 3, 48, 48)


def without_weights(model, heads):
    """The model with the columns of the output projection that read these heads set to zero."""
    cut = copy.deepcopy(model)
    with torch.no_grad():
        for layer, head in heads:
            attention = cut.blocks[layer].attn
            attention.proj.weight[:, head * attention.head_dim : (head + 1) * attention.head_dim] = 0
    return cut


@pytest.mark.parametrize("heads", [[(0, 0)], [(2, 1)], [(0, 2), (0, 0), (1, 1), (1, 1)], []])
def test_equals_zeroed_projection_columns(model, images, heads):
    targets = torch.tensor([0, 1, 2, 4])
    found = ablate_heads(model, images, targets, heads=heads)
    with torch.no_grad():
        intact, cut = model(images), without_weights(model, heads)(images)
    torch.testing.assert_close(found.logit_change, (cut - intact)[range(4), targets], atol=1e-5, rtol=1e-4)
    loss = [nn.functional.cross_entropy(logits, targets, reduction="none") for logits in (cut, intact)]
    torch.testing.assert_close(found.loss_change, loss[0] - loss[1], atol=1e-5, rtol=1e-4)
    assert torch.equal(found.predictions, cut.argmax(-1))
    if not heads:
        assert found.logit_change.abs().max() == 0
    else:
        assert found.logit_change.abs().max() > 1e-3


def test_predicted_class_and_known_logits(model, images):
    with torch.no_grad():
        logits = model(images)
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    found = ablate_heads(model, images, heads=[(1, 0)])
    assert len(calls) == 2
    again = ablate_heads(model, images, heads=[(1, 0)], logits=logits)
    handle.remove()
    assert len(calls) == 3
    assert torch.equal(found.targets, logits.argmax(-1))
    torch.testing.assert_close(again.logit_change, found.logit_change)


def test_hugging_face_model():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        image_size=32,
        patch_size=16,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
    )
    vit = transformers.ViTForImageClassification(config).eval()
    for parameter in vit.parameters():
        nn.init.normal_(parameter, std=0.4)
    images = torch.randn(2, 3, 32, 32)
    found = ablate_heads(vit, {"pixel_values": images}, torch.tensor([0, 1]), heads=[(1, 1)])
    outputs = []

    def cut(module, args):
        # What the output projection of the last layer reads: its second half comes from head 1.
        outputs.append(args[0].shape)
        return (torch.cat([args[0][..., :8], torch.zeros_like(args[0][..., 8:])], -1), *args[1:])

    square = [m for m in vit.modules() if isinstance(m, nn.Linear) and m.in_features == m.out_features == 16]
    handle = square[-1].register_forward_pre_hook(cut)
    with torch.no_grad():
        without = vit(images).logits
    handle.remove()
    with torch.no_grad():
        intact = vit(images).logits
    assert len(outputs) == 1
    torch.testing.assert_close(found.logit_change, (without - intact)[[0, 1], [0, 1]], atol=1e-5, rtol=1e-4)


def test_model_is_left_alone(model, images):
    training = copy.deepcopy(model).train()
    before = {name: value.clone() for name, value in training.state_dict().items()}
    first = ablate_heads(training, images, heads=[(0, 0)])
    assert all(module.training for module in training.modules())
    assert all(torch.equal(value, before[name]) for name, value in training.state_dict().items())
    torch.testing.assert_close(first.logit_change, ablate_heads(model, images, heads=[(0, 0)]).logit_change)
    assert not first.logit_change.requires_grad


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ([(3, 0)], "3 attention layers, not layer 3"),
        ([(0, 3)], "3 heads, not head 3"),
        ([(-1, 0)], "not layer -1"),
    ],
)
def test_heads_that_do_not_exist(model, images, heads, message):
    with pytest.raises(ValueError, match=message):
        ablate_heads(model, images, heads=heads)
