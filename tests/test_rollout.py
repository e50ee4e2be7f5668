"""The rollout as a row vector against full matrix products, all forms in one sweep."""

import pytest
import torch

from gmar_lightning.explain import blocks as module
from gmar_lightning.explain.attention import AttentionCall
from gmar_lightning.explain.rollout import forms_of, pull, to_grid
from gmar_lightning.explain.sweep import Form, Sweep
from gmar_lightning.explain.tokens import TokenLayout
from tests.helpers.reference import full_rollout

FORMS = ("gradient", "paper", "flow", "rollout", "last_layer")


def calls_of(depths=(0, 1, 2, 3), batch=2, heads=3, tokens=6, dim=5):
    generator = torch.Generator().manual_seed(1)

    def tensor(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    calls, grads = [], []
    for depth in depths:
        q, k, v, output, grad = (tensor(batch, heads, tokens, dim) for _ in range(5))
        calls.append(AttentionCall(name="", q=q, k=k, v=v, mask=None, scale=0.4, output=output, depth=depth))
        grads.append(grad)
    return calls, grads


def rows_of(calls, grads, start, forms, residual=1.0):
    sweep = Sweep(calls, start, Form("l1", forms, residual), TokenLayout(0, None), None)
    for index in reversed(range(len(calls))):
        sweep.take(index, grads[index])
    return sweep.maps()


def weighted_maps(calls, grads, form):
    maps = []
    for call, grad in zip(calls, grads, strict=True):
        attention = (call.q @ call.k.mT * call.scale).softmax(-1)
        at_map = grad @ call.v.mT
        weights = at_map.abs().sum((-2, -1))
        weights = torch.ones_like(weights) if form == "rollout" else weights
        weights = weights / weights.sum(-1, keepdim=True)
        attention = (attention * at_map).clamp(min=0) if form == "gradient" else attention
        maps.append((weights[:, :, None, None] * attention).sum(1))
    return maps


@pytest.mark.parametrize("residual", [0.0, 0.5, 1.0, 3.0])
def test_every_form_equals_the_full_product(residual):
    calls, grads = calls_of()
    start = torch.rand(2, 6, dtype=torch.float64).softmax(-1)
    together = rows_of(calls, grads, start, FORMS, residual)
    assert tuple(together) == FORMS
    for form in FORMS:
        product = full_rollout(weighted_maps(calls, grads, form), form, residual)
        expected = (start[:, None] @ product)[:, 0]
        torch.testing.assert_close(together[form], expected)
        torch.testing.assert_close(rows_of(calls, grads, start, (form,), residual)[form], expected)
        assert (together[form] >= 0).all()


@pytest.mark.parametrize("form", FORMS)
def test_calls_of_one_depth_are_averaged(form):
    calls, grads = calls_of(depths=(0, 0, 1, 1))
    start = torch.eye(6, dtype=torch.float64)[:1].expand(2, -1)
    maps = weighted_maps(calls, grads, form)
    expected = full_rollout([(maps[0] + maps[1]) / 2, (maps[2] + maps[3]) / 2], form, 1.0)
    row = rows_of(calls, grads, start, FORMS)[form]
    torch.testing.assert_close(row, (start[:, None] @ expected)[:, 0])


@pytest.mark.parametrize("form", ["flow", "rollout"])
def test_flow_is_a_distribution(form):
    start = torch.eye(6, dtype=torch.float64)[:1].expand(2, -1)
    row = rows_of(*calls_of(), start, (form,), 0.3)[form]
    torch.testing.assert_close(row.sum(-1), torch.ones(2, dtype=torch.float64))


def test_blocks_change_nothing(monkeypatch):
    (call,), _ = calls_of(depths=(0,))
    row, weights = torch.rand(2, 6, dtype=torch.float64), torch.rand(2, 3, dtype=torch.float64)
    attention = (call.q @ call.k.mT * call.scale).softmax(-1)
    expected = torch.einsum("bi,bh,bhij->bj", row, weights, attention)
    for limit in (1, 12, 36, 72, 2**18):
        monkeypatch.setitem(module._BLOCK_ELEMENTS, "cpu", limit)
        torch.testing.assert_close(pull(row, call, weights), expected)


def test_names_of_forms():
    assert forms_of("flow") == ("flow",)
    assert forms_of(["paper", "gradient", "paper"]) == ("paper", "gradient")
    for wrong in ("full", ("gradient", "full"), ()):
        with pytest.raises(ValueError, match="'gradient', 'paper', 'flow', 'rollout', 'last_layer'"):
            forms_of(wrong)


def test_grid_takes_the_patches_between_prefix_and_suffix():
    row = torch.arange(10.0)[None]
    assert torch.equal(to_grid(row, 2, (2, 3)), torch.tensor([[[2.0, 3, 4], [5, 6, 7]]]))
    assert to_grid(row, 1, (3, 3)).shape == (1, 3, 3)
