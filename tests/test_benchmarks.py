"""The benchmarks' own arithmetic: maps equal the engine's, scores equal the pure functions, tables are readable."""

import math
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from gmar_lightning.explain.faithfulness import average_drop, deletion, insertion, saco
from gmar_lightning.explain.gmar import gmar
from tests.benchmarks import faithfulness, head_importance
from tests.benchmarks.scoring import METHODS, method_maps, sanity, score, table
from tests.benchmarks.weightings import flow, gated_rows, layers_of


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=48, depth=2, num_classes=3).eval()
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.mul_(2)
    return vit


@pytest.fixture(scope="module")
def batch():
    torch.manual_seed(1)
    return torch.randn(3, 3, 48, 48), torch.tensor([0, 1, 2])


def test_weightings_start_from_the_engines_numbers(model, batch):
    layers = layers_of(model, *batch)
    scores = [layer.G.abs().sum((-2, -1)) for layer in layers]
    row = flow(layers, [layer.by_heads(s) for layer, s in zip(layers, scores, strict=True)])
    found = gmar(model, *batch, norm="l1", rollout="flow")
    torch.testing.assert_close(torch.stack(scores, 1), found.importance, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(row[:, 1:].unflatten(1, (3, 3)), found.heatmaps, rtol=1e-4, atol=1e-6)
    assert gated_rows(layers).min() >= 0


def test_scores_are_those_of_the_pure_functions(model, batch):
    images, targets = batch
    maps = method_maps(model, images, targets)
    assert list(maps) == ["random", "centre prior", *METHODS]
    assert torch.equal(maps["random"], method_maps(model, images, targets)["random"])
    for attention, insert, remove in ((False, "blur", "mean"), (True, "attention", "attention")):
        found = score(model, images, targets, maps, steps=3, groups=3, attention=attention)["GMAR paper L1"]
        drawn = maps["GMAR paper L1"]
        torch.testing.assert_close(
            found["insertion"], insertion(model, images, drawn, targets, steps=3, baseline=insert)
        )
        torch.testing.assert_close(
            found["deletion"], deletion(model, images, drawn, targets, steps=3, baseline=remove)
        )
        torch.testing.assert_close(
            found["SaCo"], saco(model, images, drawn, targets, groups=3, baseline=remove)
        )
        if not attention:
            torch.testing.assert_close(
                found["avg drop"], average_drop(model, images, drawn, targets, baseline="mean")
            )


def test_what_cannot_see_class_or_weights_is_called_blind(model, batch):
    images, targets = batch
    found = sanity(model, images, targets, method_maps(model, images, targets))
    blind = {name for name, values in found.items() if (values["class"] > 1 - 1e-6).all()}
    assert blind == {"random", "centre prior", "last-layer attention", "rollout (flow, uniform)"}
    unmoved = {name for name, values in found.items() if (values["weights"] > 1 - 1e-6).all()}
    assert unmoved == {"random", "centre prior"}


def test_table_gives_standard_errors_and_paired_differences():
    scores = {"a": {"m": [1.0, 2.0, 3.0]}, "b": {"m": [2.0, 3.0, 4.0]}, "c": {"m": [math.nan] * 3}}
    assert f"| a | 2.000 ± {1 / math.sqrt(3):.3f} |" in table(scores)
    assert "| b | +1.000 ± 0.000 |" in table(scores, against="a")
    assert "| c | nan ± nan |" in table(scores)


def test_gate_scores_are_the_first_order_effect_of_a_head(model, batch):
    """`|dO . O|` is the derivative of the logit along a factor on the head's output."""
    images, labels = batch
    logit, _, magnitude = head_importance.gate_scores(model, images, labels)
    projection, step = model.blocks[1].attn.proj, 1e-2
    original, values = projection.weight.detach().clone(), []
    with torch.no_grad():
        for factor in (1 + step, 1 - step):
            projection.weight[:, :64] = original[:, :64] * factor
            values.append(model(images).gather(1, labels[:, None])[:, 0])
            projection.weight.copy_(original)
    expected = ((values[0] - values[1]) / (2 * step)).abs()
    torch.testing.assert_close(logit[:, 1, 0], expected, rtol=0.02, atol=1e-3)
    assert magnitude.shape == (3, 2, 3)


@pytest.mark.slow
def test_end_to_end_on_a_folder(tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    for part, count in (("train", 6), ("val", 3)):
        for label, name in enumerate(("dark", "light", "middling")):
            (tmp_path / part / name).mkdir(parents=True)
            (tmp_path / "val_masks" / name).mkdir(parents=True, exist_ok=True)
            for index in range(count):
                pixels = rng.integers(60 * label, 60 * label + 60, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / name / f"{index}.png")
                mask = np.zeros((32, 32), np.uint8)
                mask[:16] = 255
                Image.fromarray(mask).save(tmp_path / "val_masks" / name / f"{index}.png")
    torch.manual_seed(0)
    torch.save(
        timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0).state_dict(), tmp_path / "w.pth"
    )
    common = ["x", "--model", "vit_tiny_patch16_224", "--weights", str(tmp_path / "w.pth"), "--size", "32"]
    common += ["--images", str(tmp_path), "--batch", "4"]
    monkeypatch.setattr(
        sys, "argv", [*common, "--steps", "2", "--groups", "2", "--save", str(tmp_path / "s.json")]
    )
    faithfulness.main()
    printed = capsys.readouterr().out
    assert "9 validation images of 3 classes" in printed
    assert "the object covers 0.500" in printed
    assert printed.count("gradient-gated GMAR L1") == 2
    monkeypatch.setattr(sys, "argv", [*common, "--probe", "3", "--removed", "0.5"])
    head_importance.main()
    assert "12 x 3 heads" in capsys.readouterr().out
