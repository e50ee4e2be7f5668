"""Class sensitivity and randomisation of the top block, against plain recomputation."""

import copy
import functools

import numpy as np
import pytest
import scipy.stats
import timm
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from gmar_lightning.explain.explained import runner_up
from gmar_lightning.explain.gmar import gmar
from gmar_lightning.explain.sanity import (
    SkippedCheckError,
    class_sensitivity,
    randomisation,
    rank_correlation,
    shuffled_top_block,
)
from tests.benchmarks.cost import operations
from tests.helpers.networks import ViT, pictures, seeded

gradient = functools.partial(gmar, rollout="gradient")


def test_rank_correlation_is_spearmans():
    generator = torch.Generator().manual_seed(0)
    first = torch.rand(6, 5, 7, generator=generator)
    second = first + torch.rand(6, 5, 7, generator=generator)
    first[1] = first[1].mul(4).round()  # ties
    second[2] = second[2].mul(3).round()
    expected = [
        scipy.stats.spearmanr(a.ravel(), b.ravel()).statistic for a, b in zip(first, second, strict=True)
    ]
    np.testing.assert_allclose(rank_correlation(first, second), expected, atol=1e-12)
    first[3], first[4, 0, 0] = 1.0, torch.nan
    assert rank_correlation(first, second).isnan().tolist() == [False, False, False, True, True, False]


def test_class_sensitivity_compares_with_the_runner_up():
    model, images = seeded(ViT), pictures(4)
    result = gradient(model, images)
    ranked = result.logits.argsort(descending=True)
    assert runner_up(result.logits, result.targets).tolist() == ranked[:, 1].tolist()
    # whichever class is explained, the runner-up is the best of the others
    assert runner_up(result.logits, ranked[:, 3]).tolist() == ranked[:, 0].tolist()
    found = class_sensitivity(model, images, result.heatmaps, result.targets, result.logits, gradient)
    by_hand = [
        scipy.stats.spearmanr(
            result.heatmaps[k].ravel(),
            gradient(model, images[k : k + 1], ranked[k : k + 1, 1]).heatmaps.ravel(),
        ).statistic
        for k in range(4)
    ]
    np.testing.assert_allclose(found, by_hand, atol=1e-3)
    assert found.abs().max() < 1


class Mean(ViT):
    def forward(self, images):
        return self.head(self.features(images)[:, 1:].mean(1))


def timm_vit(checkpointed=False, **options):
    torch.manual_seed(0)
    model = timm.models.VisionTransformer(
        img_size=pictures().shape[-1],
        patch_size=8,
        embed_dim=24,
        depth=2,
        num_heads=3,
        num_classes=5,
        **options,
    )
    model.set_grad_checkpointing(checkpointed)
    return model.train(checkpointed)


@pytest.mark.parametrize(
    "build",
    [
        lambda: seeded(ViT),
        lambda: seeded(Mean),
        lambda: timm_vit(global_pool="map", class_token=False),
        lambda: timm_vit(checkpointed=True),
    ],
    ids=["class token", "mean", "attention pool", "checkpointed"],
)
def test_the_runner_up_comes_from_a_second_backward_of_the_same_pass(build):
    model, images = build().double(), pictures(3).double()
    for form in ("gradient", "paper", "flow"):
        both = gmar(model, images, rollout=form, runner_up=True)
        others = both.logits.argsort(descending=True)[:, 1]
        alone = gmar(model, images, others, rollout=form)
        assert torch.allclose(both.runner_up, alone.heatmaps, rtol=1e-10, atol=0)
        # and the explanation itself is what it is without
        assert torch.equal(both.heatmaps, gmar(model, images, rollout=form).heatmaps)
    forwards = []
    counting = register_module_forward_hook(
        lambda module, *_: forwards.append(1) if module is model else None
    )
    with counting:
        gmar(model, images, runner_up=True)
    assert len(forwards) == 1


def test_the_runner_up_costs_a_backward_and_no_forward():
    model, images = timm_vit(), pictures(2)
    gmar(model, images, runner_up=True)
    with torch.no_grad():
        forward = operations(lambda: model(images))
    one = operations(lambda: gmar(model, images))
    both = operations(lambda: gmar(model, images, runner_up=True))
    # a backward over activations multiplies as often as a forward, and ends at the first attention
    assert 0.5 < (both - one) / forward < 1
    assert gmar(model, images, lambda output: output[:, 0], runner_up=True).runner_up is None


def test_plain_rollout_is_class_blind():
    model, images = seeded(ViT), pictures(3)
    plain = functools.partial(gmar, norm="uniform", rollout="flow")
    result = plain(model, images)
    found = class_sensitivity(model, images, result.heatmaps, result.targets, result.logits, plain)
    np.testing.assert_allclose(found, 1.0)
    one_class = result.logits[:, :1]
    with pytest.raises(SkippedCheckError, match="no second class"):
        class_sensitivity(model, images, result.heatmaps, torch.zeros(3, dtype=torch.long), one_class, plain)


def test_randomisation_shuffles_the_top_block_alone():
    model, images = seeded(ViT), pictures(3)
    result = gradient(model, images)
    found = randomisation(model, images, result.heatmaps, result.targets, gradient, layer=result.layers[-1])
    twin = copy.deepcopy(model)
    block = twin.get_submodule(result.layers[-1].rpartition(".")[0])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in block.parameters():
            order = torch.randperm(parameter.numel(), generator=generator)
            parameter.copy_(parameter.flatten()[order].view_as(parameter))
    changed = gradient(twin, images, result.targets).heatmaps
    assert not torch.equal(changed, result.heatmaps)
    np.testing.assert_allclose(found, rank_correlation(result.heatmaps, changed), atol=1e-9)


@pytest.mark.parametrize("fails", [False, True])
def test_the_parameters_come_back_untouched(fails):
    model, images = seeded(ViT), pictures(2)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    model.get_parameter("head.weight").requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters())
    layer = gradient(model, images).layers[-1]
    before = {name: (p, p._version, p.grad, p.requires_grad) for name, p in model.named_parameters()}
    values = {name: p.detach().clone() for name, p in model.named_parameters()}
    random_state = torch.get_rng_state()
    try:
        with shuffled_top_block(model, layer) as block:
            inside = dict(model.named_parameters())
            exchanged = [name for name in inside if inside[name] is not before[name][0]]
            assert len(exchanged) == len(list(block.parameters())) > 4
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    for name, (parameter, version, grad, requires_grad) in before.items():
        assert after[name] is parameter
        assert (parameter._version, parameter.requires_grad) == (version, requires_grad)
        assert parameter.grad is grad
        assert torch.equal(parameter, values[name])
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {
        id(p) for p in after.values()
    }
    assert torch.equal(torch.get_rng_state(), random_state)


def test_what_cannot_be_exchanged_is_skipped_with_its_reason():
    model = seeded(ViT)
    layer = gradient(model, pictures(1)).layers[-1]
    with pytest.raises(SkippedCheckError, match="no module"), shuffled_top_block(model, "nowhere.attn"):
        pass

    class FullyShardedDataParallel(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

    with (
        pytest.raises(SkippedCheckError, match="sharded by FullyShardedDataParallel"),
        shuffled_top_block(FullyShardedDataParallel(model), f"inner.{layer}"),
    ):
        pass
    block = model.get_submodule(layer.rpartition(".")[0])
    block.register_parameter("table", nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False))
    with (
        pytest.raises(SkippedCheckError, match="table is a Tensor"),
        shuffled_top_block(model, layer),
    ):
        pass
