"""Ablating a head as it is computed against removing it from the weights."""

import copy

import pytest
import timm
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from gmar_lightning.explain.ablation import ablate_heads, gate_effects, head_outputs


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
    # Not a hook of the model itself: what such a hook writes is put back after every explanation.
    handle = register_module_forward_hook(lambda module, *_: calls.append(1) if module is model else None)
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


def replaced_by_mean(model, images, heads):
    """Logits with the output of heads set to its mean over the images, by a hook of this test's own."""
    kept, handles = {}, []
    for layer, head in heads:
        attention = model.blocks[layer].attn
        part = slice(head * attention.head_dim, (head + 1) * attention.head_dim)

        def keep(_, args, at=(layer, head), part=part):
            kept[at] = args[0][..., part].mean(0)

        handles.append(attention.proj.register_forward_pre_hook(keep))
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    handles = []
    for layer, head in heads:
        attention = model.blocks[layer].attn
        part = slice(head * attention.head_dim, (head + 1) * attention.head_dim)

        def put(_, args, at=(layer, head), part=part):
            x = args[0].clone()
            x[..., part] = kept[at]
            return (x,)

        handles.append(attention.proj.register_forward_pre_hook(put))
    with torch.no_grad():
        logits = model(images)
    for handle in handles:
        handle.remove()
    return logits


@pytest.mark.parametrize("heads", [[(1, 2)], [(0, 0), (2, 1)]])
def test_mean_ablation_equals_the_mean_put_in_by_hooks(model, images, heads):
    targets = torch.tensor([0, 1, 2, 4])
    found = ablate_heads(model, images, targets, heads=heads, method="mean")
    with torch.no_grad():
        expected = (replaced_by_mean(model, images, heads) - model(images))[range(4), targets]
    torch.testing.assert_close(found.logit_change, expected, atol=1e-5, rtol=1e-4)
    zeroed = ablate_heads(model, images, targets, heads=heads).logit_change
    assert (found.logit_change - zeroed).abs().max() > 1e-3


def test_means_of_other_images_are_taken_as_given(model, images):
    everyone = {at: x.mean(0) for at, x in head_outputs(model, images, heads=[(1, 2)]).items()}
    whole = ablate_heads(model, images, heads=[(1, 2)], method="mean")
    parts = [
        ablate_heads(model, part, heads=[(1, 2)], method="mean", means=everyone) for part in images.split(2)
    ]
    torch.testing.assert_close(
        torch.cat([p.logit_change for p in parts]), whole.logit_change, atol=1e-5, rtol=1e-4
    )


def test_unknown_method_is_refused(model, images):
    with pytest.raises(ValueError, match="method"):
        ablate_heads(model, images, heads=[(0, 0)], method="shuffle")


def test_gates_sum_to_what_zeroing_all_of_them_does(model, images):
    """Completeness of integrated gradients, and of the straight line from all to none that they walk."""
    targets, heads = torch.tensor([0, 1, 2, 4]), [(0, 1), (2, 0)]
    parts = gate_effects(model, images, targets, heads=heads, steps=64)
    together = ablate_heads(model, images, targets, heads=heads).logit_change
    torch.testing.assert_close(parts.sum(1), together, atol=2e-3, rtol=1e-2)
    coarse = gate_effects(model, images, targets, heads=heads)
    assert (coarse.sum(1) - together).abs().max() < 0.3 * together.abs().max()
    assert not any(parameter.grad is not None for parameter in model.parameters())
