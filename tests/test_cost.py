"""Bounds on what an explanation costs, and the census on a few names."""

import pytest
import timm
import torch

from gmar_lightning import gmar
from gmar_lightning.explain import kernel
from tests.benchmarks.census import HEADS_ONLY, STAGE, WHOLE, census
from tests.benchmarks.cost import memory, operation_row, operation_row_by_depth, operations
from tests.helpers.networks import ViT, pictures, seeded


def test_operations_on_vit_base():
    row = operation_row_by_depth("vit_base_patch16_224", 224)
    assert row["l1"] <= 2.10
    assert row["l2"] <= 2.08
    assert min(row.values()) > 2
    # all forms, all signals and what every head attends to come from the same pass
    assert row["probe"] <= 1.03 * row["l1"]


@pytest.mark.slow
def test_operations_on_vit_base_where_no_map_is_kept(monkeypatch):
    """As in a probe of many images: maps are computed again, and for the paper's form once more."""
    monkeypatch.setattr(kernel, "_KEPT_BYTES", 0)
    row = operation_row_by_depth("vit_base_patch16_224", 224)
    assert row["probe"] <= 1.03 * row["l1"]


@pytest.mark.slow
def test_operations_grow_with_depth_by_equal_steps():
    """What `operation_row_by_depth` concludes from three layers is what twelve cost."""
    whole = operation_row("vit_base_patch16_224", 224, beside=False)
    assert whole == pytest.approx(operation_row_by_depth("vit_base_patch16_224", 224), rel=1e-9)


def test_cost_does_not_depend_on_the_batch():
    model = seeded(ViT)
    for batch in (1, 4):
        gmar(model, pictures(batch))
    one = operations(lambda: gmar(model, pictures(1)))
    assert operations(lambda: gmar(model, pictures(4))) == pytest.approx(4 * one, rel=1e-6)


def test_a_model_is_looked_at_once():
    """Five forward passes over two images, on the first call; 2 % of a run of eight probes of 32 images."""
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5).eval()
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        forward = operations(lambda: model(images[:1]))
    first, second = (operations(lambda: gmar(model, images)) for _ in range(2))
    assert 0 < (first - second) / forward <= 10.5
    assert operations(lambda: gmar(model, images)) == second
    probe = 32 * second / 2
    assert (first - second) / (8 * probe) <= 0.02


@pytest.mark.slow
def test_memory_at_1024_pixels():
    ours, theirs, training = memory("l1"), memory("reference"), memory("training")
    assert ours < theirs / 3
    deep = memory("l1", depth=24) - ours
    # Twelve more layers may cost their ordinary activations, which a training step holds as well.
    assert deep < 1.3 * (memory("training", depth=24) - training)


@pytest.mark.slow
def test_census_of_some_families():
    families = {
        WHOLE: ["vit_tiny", "deit_tiny", "beit_base", "eva02_tiny", "dinov3", "vit_relpos_small"],
        STAGE: ["swin_tiny", "swinv2_tiny", "maxvit_tiny", "gcvit_xxtiny", "levit_128s", "twins_svt_small"],
        HEADS_ONLY: ["crossvit_9", "pit_ti", "pvt_v2_b0"],
        "refused": ["xcit_nano", "resnet18"],
    }
    rows = census([word for words in families.values() for word in words])
    assert not [row for row in rows if row.verdict in ("wrong", "error", "not run", "not built")]
    for verdict, words in families.items():
        for word in words:
            assert verdict in {row.verdict for row in rows if any(word in name for name in row.names)}, word
    assert not torch.is_inference_mode_enabled()
