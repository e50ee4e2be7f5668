"""Faithfulness measures against hand-computed cases, plain loops, Quantus and physically dropped tokens."""

import math
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from gmar_lightning.explain.errors import UnsupportedModelError
from gmar_lightning.explain.faithfulness import (
    average_drop,
    average_increase,
    deletion,
    insertion,
    live_faithfulness,
    saco,
)
from gmar_lightning.explain.gmar import gmar
from gmar_lightning.explain.localisation import energy_in_mask, pointing_game
from gmar_lightning.explain.perturbation import perturbing
from gmar_lightning.targets import Regression

BASELINES = ("black", "mean", "blur", "attention")
WEIGHTS = torch.tensor([[2.0, 1.0], [0.5, -1.5]])


class Evidence(nn.Module):
    """Two classes; the logit of class 1 is the weighted brightness of the four quarters of the image."""

    def forward(self, images):
        cells = nn.functional.adaptive_avg_pool2d(images.mean(1, keepdim=True), (2, 2))[:, 0]
        logit = (cells * WEIGHTS).sum((1, 2))
        return torch.stack([torch.zeros_like(logit), logit], 1)


@contextmanager
def counting(model, calls):
    # Not a hook of the model itself: what such a hook writes is put back after every explanation.
    handle = register_module_forward_hook(lambda module, *_: calls.append(1) if module is model else None)
    yield
    handle.remove()


def sigmoid(value):
    return 1 / (1 + math.exp(-value))


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=(48, 80), patch_size=16, depth=3, num_classes=5
    )
    with torch.no_grad():
        for parameter in model.parameters():  # sharper attention and predictions than at initialisation
            parameter.mul_(2.5)
    return model.eval()


@pytest.fixture(scope="module")
def batch(vit):
    torch.manual_seed(1)
    images = torch.randn(3, 3, 48, 80)
    return images, torch.rand(3, 3, 5), torch.tensor([0, 2, 4])


# --- hand-computed: white image, black baseline, so that a cell shown adds exactly its weight


def test_insertion_by_hand():
    found = insertion(
        Evidence(), torch.ones(1, 3, 8, 8), WEIGHTS[None], torch.tensor([1]), steps=4, baseline="black"
    )
    curve = [sigmoid(v) for v in (0.0, 2.0, 3.0, 3.5, 2.0)]
    expected = sum((a + b) / 2 for a, b in pairwise(curve)) / 4
    assert float(found) == pytest.approx(expected, abs=1e-6)


def test_deletion_by_hand_with_uneven_steps():
    found = deletion(
        Evidence(), torch.ones(1, 3, 8, 8), WEIGHTS[None], torch.tensor([1]), steps=3, baseline="black"
    )
    curve = [(0, 2.0), (1 / 4, 0.0), (3 / 4, -1.5), (1, 0.0)]  # 4 cells in 3 steps: after 0, 1, 3 and 4 cells
    expected = sum((sigmoid(a) + sigmoid(b)) / 2 * (y - x) for (x, a), (y, b) in pairwise(curve))
    assert float(found) == pytest.approx(expected, abs=1e-6)


def test_average_drop_and_increase_by_hand():
    images, targets = torch.ones(2, 3, 8, 8), torch.tensor([1, 0])
    heat = torch.tensor([[[5.0, 1.0], [1.0, 1.0]], [[5.0, 1.0], [1.0, 1.0]]])
    with torch.no_grad():  # the enlarged map itself is the picture
        shown = nn.functional.interpolate((heat[:1, None] - 1) / 4, (8, 8), mode="bilinear")
        kept = float(Evidence()(shown.expand(-1, 3, -1, -1))[0, 1])
    intact = 2.0
    drop = average_drop(Evidence(), images, heat, targets)
    assert 0 < kept < intact
    assert drop[0] == pytest.approx((sigmoid(intact) - sigmoid(kept)) / sigmoid(intact), abs=1e-5)
    assert drop[1] == 0  # class 0 gains when evidence for class 1 is dimmed
    assert average_increase(Evidence(), images, heat, targets).tolist() == [0.0, 1.0]


@pytest.mark.parametrize(("heat", "expected"), [(WEIGHTS, 1.0), (-WEIGHTS, -1.0), (torch.ones(2, 2), 0.0)])
def test_saco_of_the_truth_its_opposite_and_nothing(heat, expected):
    found = saco(
        Evidence(), torch.ones(1, 3, 8, 8), heat[None], torch.tensor([1]), groups=4, baseline="black"
    )
    assert float(found) == pytest.approx(expected, abs=1e-6)


def test_saco_by_hand():
    """Heat 3, 2, 1, 0 on cells whose removal costs 0.5, 1, 2, -1.5 of logit: pairs right or wrong by hand."""
    heat = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    found = saco(
        Evidence(), torch.ones(1, 3, 8, 8), heat[None], torch.tensor([1]), groups=4, baseline="black"
    )
    # (3,2) wrong 1, (3,1) wrong 2, (3,0) right 3, (2,1) wrong 1, (2,0) right 2, (1,0) right 1
    assert float(found) == pytest.approx((3 + 2 + 1 - 1 - 2 - 1) / 10, abs=1e-6)


def test_black_is_black_before_normalisation():
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.1]
    pixels = torch.rand(2, 3, 8, 8)
    normalised = (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]

    class Raw(nn.Module):
        def forward(self, images):
            return Evidence()(images * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None])

    targets, heat = torch.tensor([1, 0]), torch.rand(2, 2, 2)
    expected = insertion(Evidence(), pixels, heat, targets, steps=4, baseline="black")
    found = insertion(Raw(), normalised, heat, targets, steps=4, baseline="black", mean=mean, std=std)
    torch.testing.assert_close(found, expected)


def test_pointing_game_and_energy_by_hand():
    heat = torch.tensor([[[4.0, 1.0], [2.0, 1.0]]]).expand(4, -1, -1)
    masks = torch.zeros(4, 6, 8)
    masks[0, :3, :4] = 1  # the hottest cell, whole
    masks[1, 3:, :] = 255  # the lower half
    masks[2, :3, :2] = 1  # half of the hottest cell, left of its centre
    assert pointing_game(heat, masks)[:3].tolist() == [1.0, 0.0, 0.0]
    torch.testing.assert_close(energy_in_mask(heat, masks)[:3], torch.tensor([4 / 8, 3 / 8, 2 / 8]))
    assert pointing_game(heat, masks)[3].isnan()
    assert energy_in_mask(heat, masks)[3].isnan()
    assert pointing_game(torch.ones(1, 2, 2), masks[1:2]).tolist() == [0.5]
    with pytest.raises(ValueError, match="non-negative"):
        energy_in_mask(-heat, masks)
    with pytest.raises(ValueError, match="as many images"):
        pointing_game(heat, masks[:2])


# --- a plain loop, image by image and cell by cell, on a Vision Transformer with a 3 x 5 grid


def loop_curve(model, image, heat, target, counts, insert, removed):
    curve = []
    order = np.argsort(-heat.ravel())
    for count in counts:
        changed = set(order[:count].tolist())
        picture = image.copy()
        for cell in range(heat.size):
            if (cell in changed) != insert:
                row, column = divmod(cell, heat.shape[1])
                window = (slice(None), slice(row * 16, row * 16 + 16), slice(column * 16, column * 16 + 16))
                picture[window] = removed[window]
        with torch.no_grad():
            curve.append(float(model(torch.from_numpy(picture)[None]).softmax(-1)[0, target]))
    return curve


@pytest.mark.parametrize("insert", [True, False])
def test_areas_equal_a_plain_loop(vit, batch, insert):
    images, heatmaps, targets = batch
    measure = insertion if insert else deletion
    found = measure(vit, images, heatmaps, targets, steps=5, baseline="mean")
    for index in range(len(images)):
        image = images[index].numpy()
        removed = np.broadcast_to(image.mean((1, 2), keepdims=True), image.shape)
        curve = loop_curve(
            vit, image, heatmaps[index].numpy(), int(targets[index]), range(0, 16, 3), insert, removed
        )
        assert float(found[index]) == pytest.approx(np.trapezoid(curve, dx=0.2), abs=1e-5)


@pytest.mark.parametrize(
    ("measure", "options"),
    [
        (insertion, {"baseline": "attention"}),
        (deletion, {"steps": 3}),
        (average_drop, {"baseline": "mean"}),
        (average_increase, {}),
        (saco, {"groups": 5}),
    ],
)
def test_a_callable_that_is_the_probability_gives_the_numbers_of_the_class(vit, batch, measure, options):
    images, heatmaps, targets = batch

    def probability(output):
        return output.softmax(-1).gather(1, targets[:, None])[:, 0]

    found = measure(vit, images, heatmaps, probability, **options)
    torch.testing.assert_close(found, measure(vit, images, heatmaps, targets, **options))


def test_a_callable_of_any_sign_is_measured_in_its_own_unit(vit, batch):
    images, heatmaps, _ = batch
    target = Regression(1, sign=-1)
    found = deletion(vit, images, heatmaps, target, steps=1)
    removed = images.mean((-2, -1), keepdim=True).expand_as(images)
    with torch.no_grad():
        ends = -vit(images)[:, 1], -vit(removed)[:, 1]
    torch.testing.assert_close(found, (ends[0] + ends[1]) / 2)
    dropped = average_drop(vit, images, torch.zeros_like(heatmaps), target, baseline="mean")
    torch.testing.assert_close(dropped, (ends[0] - ends[1]).clamp_min(0) / ends[0].abs())
    with pytest.raises(UnsupportedModelError, match="returned a tensor of shape"):
        deletion(vit, images, heatmaps, lambda output: output)


def test_saco_equals_a_plain_loop(vit, batch):
    images, heatmaps, targets = batch
    found = saco(vit, images, heatmaps, targets, groups=5)
    for index in range(len(images)):
        image, heat, target = images[index].numpy(), heatmaps[index].numpy(), int(targets[index])
        removed = np.broadcast_to(image.mean((1, 2), keepdims=True), image.shape)
        order = np.argsort(-heat.ravel())
        with torch.no_grad():
            intact = float(vit(images[index][None]).softmax(-1)[0, target])
        groups = []
        for start in range(0, 15, 3):
            alone = np.full(15, -1.0)
            alone[order[start : start + 3]] = 1.0
            without = loop_curve(vit, image, alone.reshape(3, 5), target, [3], False, removed)[0]
            groups.append((heat.ravel()[order[start : start + 3]].sum(), intact - without))
        score = weight = 0.0
        for i, (heat_i, fall_i) in enumerate(groups):
            for heat_j, fall_j in groups[i + 1 :]:
                score += (heat_i - heat_j) * (1 if fall_i >= fall_j else -1)
                weight += abs(heat_i - heat_j)
        assert float(found[index]) == pytest.approx(score / weight, abs=1e-5)


def test_hidden_tokens_equal_dropped_tokens(vit, batch):
    """A token that is no key in any layer is, to a class token, a token that was never there."""
    images, heatmaps, targets = batch
    keep = heatmaps.flatten(1) > 0.4
    with perturbing(vit, images, heatmaps, targets, baseline="attention") as probe:
        found = probe.keeping(keep)
    with torch.no_grad():
        for index in range(len(images)):
            tokens = vit._pos_embed(vit.patch_embed(images[index][None]))
            kept = torch.cat([torch.tensor([True]), keep[index]])
            logits = vit.forward_head(vit.norm(vit.blocks(tokens[:, kept])))
            assert float(found[index]) == pytest.approx(
                float(logits.softmax(-1)[0, targets[index]]), abs=1e-5
            )


@pytest.mark.parametrize("kind", ["additive", "boolean", "causal"])
def test_hidden_tokens_join_the_models_own_mask(kind):
    class Masked(nn.Module):
        """One attention layer over four cells behind a class token, with a mask of its own."""

        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.qkv, self.head = nn.Linear(3, 8), nn.Linear(8, 24), nn.Linear(8, 3)

        def forward(self, images):
            cells = nn.functional.adaptive_avg_pool2d(images, (2, 2)).flatten(2).mT
            tokens = nn.functional.pad(self.embed(cells), (0, 0, 1, 0), value=0.3)
            tokens = tokens.flip(1) if kind == "causal" else tokens
            q, k, v = self.qkv(tokens).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
            seen = torch.tensor([True, True, False, True, True]).expand(1, 1, 5, 5)
            own = {"boolean": seen, "additive": torch.where(seen, 0.5, -1e30), "causal": None}[kind]
            out = nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=own, is_causal=kind == "causal"
            )
            return self.head(out.transpose(1, 2).flatten(2)[:, -1 if kind == "causal" else 0])

    model, images = Masked(), torch.randn(2, 3, 8, 8)
    if kind == "causal":  # the class token comes last there, so cells and prefix are not where they should be
        with pytest.raises(UnsupportedModelError, match="still depend on the image"):
            insertion(model, images, torch.rand(2, 2, 2), torch.tensor([0, 1]), baseline="attention")
        return
    keep = torch.tensor([[True, True, False, True], [True, False, True, False]])
    with perturbing(model, images, torch.rand(2, 2, 2), torch.tensor([0, 1]), baseline="attention") as probe:
        found = probe.keeping(keep)
    with torch.no_grad():
        cells = nn.functional.adaptive_avg_pool2d(images, (2, 2)).flatten(2).mT
        tokens = nn.functional.pad(model.embed(cells), (0, 0, 1, 0), value=0.3)
        q, k, v = model.qkv(tokens).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        scores = (q @ k.mT / 2)[:, :, 0]
        hidden = ~torch.cat([torch.ones(2, 1, dtype=torch.bool), keep], 1)
        hidden[:, 2] = True
        read = (scores.masked_fill(hidden[:, None], -math.inf).softmax(-1)[:, :, None] @ v)[:, :, 0].flatten(
            1
        )
        expected = model.head(read).softmax(-1)[[0, 1], [0, 1]]
    torch.testing.assert_close(found, expected)


# --- Quantus, where it has the measure


def test_localisation_agrees_with_quantus():
    quantus = pytest.importorskip("quantus")
    heat = torch.rand(6, 4, 4)
    masks = torch.zeros(6, 1, 16, 16, dtype=torch.bool)
    for index in range(6):
        masks[index, :, 4 * (index % 3) : 12, 2 : 3 * index + 3] = True
    pixels = heat.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None].numpy()
    shared = {
        "model": None,
        "x_batch": np.zeros((6, 1, 16, 16)),
        "y_batch": np.zeros(6, int),
        "a_batch": pixels,
        "s_batch": masks.numpy(),
    }
    options = {"disable_warnings": True, "display_progressbar": False, "normalise": False}
    mass = quantus.RelevanceMassAccuracy(**options)(**shared)
    np.testing.assert_allclose(energy_in_mask(heat, masks[:, 0]).numpy(), mass, rtol=1e-5)
    centred = torch.zeros(6, 1, 16, 16)  # the centre pixel of the hottest cell, as Quantus looks at pixels
    best = heat.flatten(1).argmax(1)
    for index, cell in enumerate(best.tolist()):
        centred[index, 0, cell // 4 * 4 + 2, cell % 4 * 4 + 2] = 1
    points = quantus.PointingGame(**options)(**{**shared, "a_batch": centred.numpy()})
    assert pointing_game(heat, masks[:, 0]).bool().tolist() == [bool(p) for p in points]


def test_deletion_agrees_with_quantus_pixel_flipping(vit, batch):
    quantus = pytest.importorskip("quantus")
    images, heatmaps, targets = batch
    pixels = heatmaps.repeat_interleave(16, 1).repeat_interleave(16, 2)[:, None].numpy()
    flip = quantus.PixelFlipping(
        features_in_step=16 * 16 * 3,  # one cell, all channels
        perturb_baseline=0.0,
        normalise=False,
        disable_warnings=True,
        display_progressbar=False,
    )
    curves = flip(
        model=vit,
        x_batch=images.numpy(),
        y_batch=targets.numpy(),
        a_batch=pixels,
        softmax=True,
        device="cpu",
        channel_first=True,
    )
    with torch.no_grad():
        intact = vit(images).softmax(-1)[range(3), targets].numpy()
    expected = np.trapezoid(np.concatenate([intact[:, None], np.asarray(curves)], 1), dx=1 / 15, axis=1)
    found = deletion(vit, images, heatmaps, targets, steps=15, baseline="black")
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


# --- what may come in


@pytest.mark.parametrize("baseline", BASELINES)
def test_nan_heatmap_costs_only_its_image(vit, batch, baseline):
    images, heatmaps, targets = batch
    broken = heatmaps.clone()
    broken[1, 0, 0] = torch.nan
    for measure in (insertion, deletion):
        whole = measure(vit, images, heatmaps, targets, steps=3, baseline=baseline)
        found = measure(vit, images, broken, targets, steps=3, baseline=baseline)
        assert found[1].isnan()
        torch.testing.assert_close(found[[0, 2]], whole[[0, 2]])
    assert saco(vit, images, broken, targets, groups=3, baseline=baseline).isnan().tolist() == [
        False,
        True,
        False,
    ]
    if baseline != "attention":
        assert average_drop(vit, images, broken, targets, baseline=baseline)[1].isnan()


@pytest.mark.parametrize("baseline", BASELINES)
def test_bfloat16_and_logits_in_an_output_object(vit, batch, baseline):
    images, heatmaps, targets = batch
    expected = insertion(vit, images, heatmaps, targets, steps=3, baseline=baseline)

    class Wrapped(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, pixel_values):
            return {"logits": self.model(pixel_values)}

    wrapped = insertion(Wrapped(vit), {"pixel_values": images}, heatmaps, targets, steps=3, baseline=baseline)
    torch.testing.assert_close(wrapped, expected)
    with torch.autocast("cpu", torch.bfloat16):
        low = insertion(vit, images, heatmaps.bfloat16().float(), targets, steps=3, baseline=baseline)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, expected, atol=0.08, rtol=0.1)


def test_hugging_face_and_torchvision_hide_tokens():
    transformers = pytest.importorskip("transformers")
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        image_size=32,
        patch_size=16,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
    )
    plain = torchvision.models.VisionTransformer(32, 16, 2, 2, 16, 32, num_classes=3)
    nn.init.normal_(plain.heads.head.weight)
    images, heat, targets = torch.randn(2, 3, 32, 32), torch.rand(2, 2, 2), torch.tensor([0, 1])
    for model in (transformers.ViTForImageClassification(config), plain):
        with perturbing(model, images, heat, targets, baseline="attention") as probe:
            assert not torch.equal(probe.empty, probe.intact)
            torch.testing.assert_close(probe.keeping(torch.ones(2, 4, dtype=torch.bool)), probe.intact)


def test_attention_pool_without_class_token_sees_nothing_at_the_end():
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_base_patch16_siglip_224", img_size=32, depth=1, embed_dim=16, num_heads=2, num_classes=3
    )
    nn.init.normal_(model.head.weight)
    with perturbing(
        model, torch.randn(3, 3, 32, 32), torch.rand(3, 2, 2), torch.zeros(3).long(), baseline="attention"
    ) as p:
        assert p.empty.isfinite().all()
        torch.testing.assert_close(p.empty, p.empty[:1].expand(3))


def test_models_that_read_patch_tokens_are_refused_attention():
    torch.manual_seed(0)
    options = {"img_size": 32, "depth": 1, "num_classes": 3}
    mean = timm.create_model("vit_tiny_patch16_224", global_pool="avg", class_token=False, **options)
    nn.init.normal_(mean.head.weight)
    images, targets = torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
    with pytest.raises(UnsupportedModelError, match="mean pooling"):
        deletion(mean, images, torch.rand(2, 2, 2), targets, baseline="attention")
    assert deletion(mean, images, torch.rand(2, 2, 2), targets, baseline="mean").isfinite().all()
    with pytest.raises(UnsupportedModelError, match="not the patch grid"):
        deletion(mean, images, torch.rand(2, 3, 3), targets, baseline="attention")


def test_equal_heat_is_neither_a_scan_nor_random(vit, batch):
    images, _, targets = batch
    flat = torch.ones(3, 3, 5)
    scan = -torch.arange(15.0).reshape(1, 3, 5).expand(3, -1, -1)
    found = deletion(vit, images, flat, targets, steps=5)
    torch.testing.assert_close(found, deletion(vit, images, flat, targets, steps=5))
    assert not torch.allclose(found, deletion(vit, images, scan, targets, steps=5))


def test_more_steps_than_cells_is_one_cell_at_a_time(vit, batch):
    images, heatmaps, targets = batch
    fine = insertion(vit, images, heatmaps, targets, steps=100)
    torch.testing.assert_close(fine, insertion(vit, images, heatmaps, targets, steps=15))


def test_model_and_random_state_are_left_alone(batch):
    images, heatmaps, targets = batch
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=(48, 80),
        depth=1,
        num_classes=5,
        drop_path_rate=0.5,
        proj_drop_rate=0.5,
    ).train()
    model.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    before = torch.get_rng_state()
    with torch.inference_mode():
        first = live_faithfulness(model, images, targets, heatmaps, steps=2)
    assert live_faithfulness(model, images, targets, heatmaps, steps=2) == first
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None and not parameter.is_inference() for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), before)


def test_live_numbers_are_those_of_the_single_measures(vit, batch):
    images, heatmaps, targets = batch
    for baseline in ("mean", "attention"):
        found = live_faithfulness(vit, images, targets, heatmaps, steps=3, baseline=baseline, seed=7)
        noise = torch.rand(heatmaps.shape, generator=torch.Generator().manual_seed(7))
        rollout = gmar(vit, images, targets, norm="uniform", rollout="flow").heatmaps
        for suffix, drawn in {"": heatmaps, "_random": noise, "_rollout": rollout}.items():
            options = {"steps": 3, "baseline": baseline}
            difference = insertion(vit, images, drawn, targets, **options) - deletion(
                vit, images, drawn, targets, **options
            )
            drop = average_drop(vit, images, drawn, targets, baseline="mean")
            assert found[f"insertion_minus_deletion{suffix}"] == pytest.approx(
                float(difference.mean()), abs=1e-5
            )
            assert found[f"average_drop{suffix}"] == pytest.approx(float(drop.mean()), abs=1e-5)


@pytest.mark.parametrize("baseline", ["mean", "attention"])
def test_live_cost_is_as_stated(vit, batch, baseline):
    images, heatmaps, targets = batch
    calls = []
    with counting(vit, calls):
        live_faithfulness(vit, images, targets, heatmaps, rollout=heatmaps, steps=4, baseline=baseline)
    assert len(calls) == 6 * 4 - 1 + 2 * (baseline == "attention")
    calls.clear()
    with counting(vit, calls):
        insertion(vit, images, heatmaps, targets, steps=4, baseline=baseline)
    assert len(calls) == 5 + (baseline == "attention")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"baseline": "noise"}, "'black', 'mean', 'blur', 'attention'"),
        ({"steps": 0}, "steps must be a positive integer"),
        ({"steps": 2.5}, "steps must be a positive integer"),
        ({"mean": [0.5] * 3}, "mean and std belong together"),
        ({"targets": torch.tensor([0, 9, 1])}, "one of the model's 5 classes"),
        ({"targets": torch.tensor([0, 1])}, "one per image"),
        ({"heatmaps": torch.rand(3, 15)}, "heatmaps must be"),
        ({"images": torch.randn(3, 48, 80)}, "images must be a float tensor"),
    ],
)
def test_wrong_arguments_are_named(vit, batch, options, message):
    given = dict(zip(("images", "heatmaps", "targets"), batch, strict=True)) | options
    with pytest.raises(ValueError, match=message):
        insertion(vit, **given)


def test_wrong_arguments_of_drop_and_saco(vit, batch):
    with pytest.raises(ValueError, match="choose one of 'black', 'mean', 'blur'"):
        average_drop(vit, *batch, baseline="attention")
    with pytest.raises(ValueError, match="between 2 and the 15 cells"):
        saco(vit, *batch, groups=16)
