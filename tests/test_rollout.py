"""The rollout as a row vector against full matrix products."""

import pytest
import torch

from gmar_lightning.explain import importance as chunks
from gmar_lightning.explain.attention import AttentionCall
from gmar_lightning.explain.rollout import pull, roll_out, to_grid
from tests.helpers.reference import full_rollout


def steps(depth=4, batch=2, heads=3, tokens=6, dim=5):
    generator = torch.Generator().manual_seed(1)

    def tensor(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    found = []
    for _ in range(depth):
        q, k, v, output, grad = (tensor(batch, heads, tokens, dim) for _ in range(5))
        call = AttentionCall(name="", q=q, k=k, v=v, mask=None, scale=0.4, output=output)
        found.append((call, tensor(batch, heads).softmax(-1), grad))
    return found


def weighted_maps(found, gated=False):
    maps = []
    for call, weights, grad in found:
        attention = (call.q @ call.k.mT * call.scale).softmax(-1)
        attention = (attention * (grad @ call.v.mT)).clamp(min=0) if gated else attention
        maps.append((weights[:, :, None, None] * attention).sum(1))
    return maps


@pytest.mark.parametrize("residual", [0.0, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("form", ["paper", "flow", "gradient", "last_layer"])
def test_equals_the_full_product(form, residual):
    found = steps()
    start = torch.rand(2, 6, dtype=torch.float64).softmax(-1)
    product = full_rollout(weighted_maps(found, form == "gradient"), form, residual)
    row = roll_out(start, [[step] for step in found], form, residual)
    torch.testing.assert_close(row, (start[:, None] @ product)[:, 0])
    assert (row >= 0).all()


def test_calls_of_one_depth_are_averaged():
    found = steps()
    start = torch.eye(6, dtype=torch.float64)[:1].expand(2, -1)
    maps = weighted_maps(found)
    expected = full_rollout([(maps[0] + maps[1]) / 2, (maps[2] + maps[3]) / 2], "flow", 1.0)
    row = roll_out(start, [found[:2], found[2:]], "flow", 1.0)
    torch.testing.assert_close(row, (start[:, None] @ expected)[:, 0])


def test_flow_is_a_distribution():
    start = torch.eye(6, dtype=torch.float64)[:1].expand(2, -1)
    row = roll_out(start, [[step] for step in steps()], "flow", 0.3)
    torch.testing.assert_close(row.sum(-1), torch.ones(2, dtype=torch.float64))


def test_chunks_change_nothing(monkeypatch):
    (call, weights, grad), row = steps(1)[0], torch.rand(2, 6, dtype=torch.float64)
    whole, gated = pull(row, call, weights), pull(row, call, weights, grad)
    monkeypatch.setattr(chunks, "_CHUNK_ELEMENTS", 2 * 3 * 6 * 4)
    torch.testing.assert_close(pull(row, call, weights), whole)
    torch.testing.assert_close(pull(row, call, weights, grad), gated)


def test_no_layer_leaves_the_start():
    start = torch.rand(2, 6)
    for form in ("flow", "gradient", "paper", "last_layer"):
        assert torch.equal(roll_out(start, [], form), start)


def test_grid_takes_the_patches_between_prefix_and_suffix():
    row = torch.arange(10.0)[None]
    assert torch.equal(to_grid(row, 2, (2, 3)), torch.tensor([[[2.0, 3, 4], [5, 6, 7]]]))
    assert to_grid(row, 1, (3, 3)).shape == (1, 3, 3)
