"""Scores per head: the closed forms against the gradient of a materialised map, whatever the blocks."""

import pytest
import torch

from gmar_lightning.explain import blocks as module
from gmar_lightning.explain.attention import AttentionCall
from gmar_lightning.explain.blocks import blocks
from gmar_lightning.explain.importance import head_weights
from gmar_lightning.explain.sweep import Form, visit
from gmar_lightning.explain.tokens import TokenLayout


def call_of(
    batch=2, heads=4, key_heads=4, queries=7, keys=7, dim=5, value_dim=6, dtype=torch.float64, **options
):
    generator = torch.Generator().manual_seed(0)

    def tensor(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    q = tensor(batch, heads, queries, dim)
    k, v = tensor(batch, key_heads, keys, dim), tensor(batch, key_heads, keys, value_dim)
    output = (q.double() @ k.double().repeat_interleave(heads // key_heads, 1).mT * 0.3).softmax(-1)
    output = (output @ v.double().repeat_interleave(heads // key_heads, 1)).to(dtype)
    call = AttentionCall(name="", q=q, k=k, v=v, mask=None, scale=0.3, output=output, **options)
    return call, tensor(batch, heads, queries, value_dim)


def numbers_of(call, grad, norm="l1", keys=None, plain=None, gated=None, signals=False):
    return visit(
        call, grad, plain or {}, gated or {}, Form(norm, signals=signals), TokenLayout(0, None), keys
    )


def head_importance(call, grad, norm="l1", keys=None):
    return numbers_of(call, grad, norm, keys).importance


def materialised(call, output_grad):
    """A and dy/dA by autograd for y with dy/dO = output_grad."""
    groups = call.q.shape[1] // call.v.shape[1]
    key = call.k.double().repeat_interleave(groups, 1)
    attention = (call.q.double() @ key.mT * call.scale).softmax(-1).requires_grad_()
    output = attention @ call.v.double().repeat_interleave(groups, 1)
    (grad,) = torch.autograd.grad((output * output_grad.double()).sum(), attention)
    return attention.detach(), grad


def gradient_at_the_map(call, output_grad):
    return materialised(call, output_grad)[1]


SHAPES = [{}, {"key_heads": 2}, {"queries": 1}, {"value_dim": 11}, {"keys": 3}]


@pytest.mark.parametrize("shape", SHAPES)
def test_closed_form(shape):
    call, grad = call_of(**shape)
    at_map = gradient_at_the_map(call, grad)
    torch.testing.assert_close(head_importance(call, grad, "l1"), at_map.abs().sum((-2, -1)))
    torch.testing.assert_close(head_importance(call, grad, "uniform"), at_map.abs().sum((-2, -1)))
    torch.testing.assert_close(head_importance(call, grad, "l2"), at_map.square().sum((-2, -1)).sqrt())


@pytest.mark.parametrize("shape", SHAPES)
def test_contribution_is_the_sum_of_map_times_gradient(shape):
    call, grad = call_of(**shape)
    attention, at_map = materialised(call, grad)
    found = numbers_of(call, grad).contribution
    torch.testing.assert_close(found, (attention * at_map).sum((-2, -1)))
    assert (found < 0).any()
    assert (found > 0).any()


@pytest.mark.parametrize("limit", [1, 7, 7 * 3, 49 * 2, 49 * 4, 2**20])
@pytest.mark.parametrize("shape", [{}, {"key_heads": 2}])
def test_blocks_change_nothing(monkeypatch, limit, shape):
    call, grad = call_of(**shape)
    rows = {"row": torch.rand(2, 7, dtype=torch.float64)}
    whole = numbers_of(call, grad, plain=rows, gated={"gate": rows["row"]}, signals=True)
    monkeypatch.setitem(module._BLOCK_ELEMENTS, "cpu", limit)
    parts = list(blocks(call))
    expected = {1: 56, 7: 56, 21: 24, 98: 4, 196: 2, 2**20: 1}[limit]
    assert len(parts) == expected
    found = numbers_of(call, grad, plain=rows, gated={"gate": rows["row"]}, signals=True)
    torch.testing.assert_close(found.importance, whole.importance)
    for name in whole.pulled:
        torch.testing.assert_close(found.pulled[name], whole.pulled[name])
    for name in whole.signals:
        torch.testing.assert_close(found.signals[name], whole.signals[name], equal_nan=True)


def test_rows_are_pulled_through_the_map_and_the_gated_map():
    call, grad = call_of(key_heads=2)
    attention, at_map = materialised(call, grad)
    one, two = torch.rand(2, 2, 7, dtype=torch.float64)
    found = numbers_of(call, grad, plain={"one": one, "two": two}, gated={"three": two}).pulled
    for name, row, seen in (
        ("one", one, attention),
        ("two", two, attention),
        ("three", two, (attention * at_map).clamp(min=0)),
    ):
        torch.testing.assert_close(found[name], torch.einsum("bi,bhij->bhj", row, seen))


def test_padded_keys_do_not_count():
    call, grad = call_of()
    real = torch.ones(2, 7)
    real[1, 4:] = 0
    at_map = gradient_at_the_map(call, grad) * real[:, None, None]
    torch.testing.assert_close(head_importance(call, grad, "l1", real), at_map.abs().sum((-2, -1)))
    torch.testing.assert_close(head_importance(call, grad, "l2", real), at_map.square().sum((-2, -1)).sqrt())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_reduced_in_float32(dtype):
    call, grad = call_of(dtype=dtype)
    for norm in ("l1", "l2"):
        found = head_importance(call, grad, norm)
        assert found.dtype == torch.float32
        at_map = gradient_at_the_map(call, grad)
        expected = at_map.abs().sum((-2, -1)) if norm == "l1" else at_map.square().sum((-2, -1)).sqrt()
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


def test_weights_are_shares_of_the_layer():
    weights = head_weights(torch.tensor([[1.0, 3.0], [0.0, 0.0], [2.0, torch.nan], [torch.nan, torch.nan]]))
    expected = torch.tensor([[0.25, 0.75], [0.5, 0.5], [1.0, torch.nan], [torch.nan, torch.nan]])
    torch.testing.assert_close(weights, expected, equal_nan=True)
