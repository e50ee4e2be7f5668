"""What a confirmed flag says: real heads switched off, measured, put into words."""

import copy

import numpy as np
import pytest
import timm
import torch

from gmar_lightning.explain.ablation import ablate_heads
from gmar_lightning.monitor.confirmation import confirm_by_ablation, with_effect
from gmar_lightning.monitor.events import HeadEvent
from gmar_lightning.monitor.explanation import explain_together
from gmar_lightning.monitor.probe import ProbeBatch
from gmar_lightning.monitor.settings import ProbeSettings


def flag(layer, head):
    return HeadEvent(30, "collapsed", layer, head, f"blocks.{layer}.attn", 0.01, 0.3, 20, "It collapsed.")


def confirmed(model, images, events, flagged=None):
    probe = ProbeBatch(images, torch.arange(len(images)) % 5)
    settings = ProbeSettings(target="label")
    explanation = explain_together(model, probe, settings)
    heads = [(e.layer, e.head) for e in events]
    return confirm_by_ablation(model, probe, explanation, events, flagged or heads, settings), probe


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
    return torch.randn(6, 3, 48, 48, generator=torch.Generator().manual_seed(1))


def test_numbers_are_those_of_ablation(model, images):
    (event,), probe = confirmed(model, images, [flag(1, 2)])
    for method, logit, loss in (
        ("zero", event.ablation_logit, event.ablation_loss),
        ("mean", event.mean_ablation_logit, event.mean_ablation_loss),
    ):
        alone = ablate_heads(model, images, probe.labels, heads=[(1, 2)], method=method)
        assert logit == pytest.approx(float(alone.logit_change.mean()), rel=1e-4, abs=1e-6)
        assert loss == pytest.approx(float(alone.loss_change.mean()), rel=1e-4, abs=1e-6)
    assert event.ablation_images == 6
    assert event.gate_logit == pytest.approx(event.ablation_logit, rel=0.3, abs=0.02)
    assert event.control_logit is not None
    assert event.message.startswith("It collapsed. Zeroing")
    assert "6 images" in event.message


def test_a_head_that_is_switched_off_is_called_idle(model, images):
    dead = copy.deepcopy(model)
    attention = dead.blocks[1].attn
    with torch.no_grad():
        attention.proj.weight[:, 2 * attention.head_dim :] = 0
    (event,), _ = confirmed(dead, images, [flag(1, 2)])
    assert event.ablation_logit == pytest.approx(0, abs=1e-6)
    assert "It is idle" in event.message
    (event,), _ = confirmed(model, images, [flag(1, 2)])
    assert "It is idle" not in event.message


def test_without_a_healthy_head_there_is_no_yardstick(model, images):
    events = [flag(1, head) for head in range(3)]
    for event in confirmed(model, images, events)[0]:
        assert event.control_logit is None
        assert "no healthy head" in event.message
    gates = sum(event.gate_logit for event in confirmed(model, images, events)[0])
    assert gates == pytest.approx(confirmed(model, images, events)[0][0].ablation_logit, rel=0.5, abs=0.05)


def test_heads_of_windows_are_zeroed_only(images):
    torch.manual_seed(0)
    swin = timm.create_model("swin_tiny_patch4_window7_224", img_size=56, window_size=7, num_classes=5).eval()
    pictures = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    (event,), _ = confirmed(swin, pictures, [flag(0, 1)])
    assert event.ablation_logit is not None
    assert event.mean_ablation_logit is None
    assert event.gate_logit is None
    assert "mean output" not in event.message


@pytest.mark.parametrize(
    ("zero", "mean", "said"),
    [(0.01, 0.02, "is idle"), (0.01, 0.9, "not idle"), (0.5, 0.4, "not idle"), (-2.0, 0.1, "depends on it")],
)
def test_verdict_takes_the_larger_of_the_two(zero, mean, said):
    effects = {
        "zero flagged": np.array([zero, 0.0]),
        "mean flagged": np.array([mean, 0.0]),
        "zero control": np.array([-1.0, 0.1]),
        "mean control": np.array([1.0, 0.1]),
    }
    assert said in with_effect(flag(0, 0), effects, zero, 32).message
