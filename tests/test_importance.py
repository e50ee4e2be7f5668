"""Head importance: the closed form against the gradient of a materialised map."""

import pytest
import torch

from gmar_lightning.explain import importance as module
from gmar_lightning.explain.attention import AttentionCall
from gmar_lightning.explain.importance import head_importance, head_weights, query_chunks


def call_of(
    batch=2, heads=4, key_heads=4, queries=7, keys=7, dim=5, value_dim=6, dtype=torch.float64, **options
):
    generator = torch.Generator().manual_seed(0)

    def tensor(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    q = tensor(batch, heads, queries, dim)
    k, v = tensor(batch, key_heads, keys, dim), tensor(batch, key_heads, keys, value_dim)
    output = tensor(batch, heads, queries, value_dim)
    call = AttentionCall(name="", q=q, k=k, v=v, mask=None, scale=0.3, output=output, **options)
    return call, tensor(batch, heads, queries, value_dim)


def gradient_at_the_map(call, output_grad):
    """dy/dA by autograd for y with dy/dO = output_grad."""
    groups = call.q.shape[1] // call.v.shape[1]
    attention = torch.rand(*call.q.shape[:3], call.k.shape[2], dtype=torch.float64).requires_grad_()
    output = attention @ call.v.double().repeat_interleave(groups, 1)
    return torch.autograd.grad((output * output_grad.double()).sum(), attention)[0]


@pytest.mark.parametrize("shape", [{}, {"key_heads": 2}, {"queries": 1}, {"value_dim": 11}, {"keys": 3}])
def test_closed_form(shape):
    call, grad = call_of(**shape)
    at_map = gradient_at_the_map(call, grad)
    torch.testing.assert_close(head_importance(call, grad, "l1"), at_map.abs().sum((-2, -1)))
    torch.testing.assert_close(head_importance(call, grad, "uniform"), at_map.abs().sum((-2, -1)))
    torch.testing.assert_close(head_importance(call, grad, "l2"), at_map.square().sum((-2, -1)).sqrt())


def test_chunks_change_nothing(monkeypatch):
    call, grad = call_of()
    whole = head_importance(call, grad)
    assert len(list(query_chunks(call))) == 1
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 2 * 4 * 7 * 3)
    assert [rows.stop - rows.start for rows in query_chunks(call)] == [3, 3, 1]
    torch.testing.assert_close(head_importance(call, grad), whole)
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 1)
    assert len(list(query_chunks(call))) == 7


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
