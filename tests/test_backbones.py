"""Families of backbones with random weights; the row that each classifier reads is written down by hand."""

import pytest
import timm
import torch
import torchvision
import transformers
from torch import nn

from gmar_lightning import UnsupportedModelError, gmar
from tests.helpers.networks import CLASSES, pictures, seeded
from tests.helpers.reference import reference, relative_error

SMALL = {"embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": CLASSES, "img_size": 32, "patch_size": 8}


def assert_exact(model, images, rollouts=("gradient", "paper", "flow", "rollout"), **how):
    how = {"grid": (4, 4), **how}
    jitter(model)
    found = gmar(model, images, rollout=rollouts, head_maps=True)
    for rollout in rollouts:
        expected = reference(model, images, rollout=rollout, **how)
        assert found.maps[rollout].shape == expected.heatmaps.shape
        assert relative_error(found.maps[rollout], expected.heatmaps) < 1e-5
    assert relative_error(found.importance, torch.stack(expected.importance, 1)) < 1e-5
    assert relative_error(found.contribution, torch.stack(expected.contribution, 1)) < 1e-5
    heads, prefix = torch.stack(expected.head_maps, 1), how.get("prefix", 1)
    patches = heads[..., prefix : prefix + how["grid"][0] * how["grid"][1]]
    assert relative_error(found.head_maps.flatten(-2), patches) < 1e-5


def jitter(model):
    """Leave no weight at zero: a learned bias that is zero would hide a mistake."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def rows(tokens, weights):
    row = torch.zeros(tokens)
    for index, weight in weights.items():
        row[index] = weight
    return row


TIMM = {
    "vit": ("vit_tiny_patch16_224", {}, {"read": "class"}),
    "deit": ("deit_tiny_patch16_224", {}, {"read": "class"}),
    "deit distilled": (
        "deit_tiny_distilled_patch16_224",
        {},
        {"read": rows(18, {0: 0.5, 1: 0.5}), "prefix": 2},
    ),
    "deit3": ("deit3_small_patch16_224", {}, {"read": "class"}),
    "dinov2 with registers": ("vit_small_patch14_reg4_dinov2", {}, {"read": "class", "prefix": 5}),
    "dinov3": ("vit_small_patch16_dinov3", {}, {"read": "mean", "prefix": 5}),
    "eva02": ("eva02_tiny_patch14_224", {}, {"read": "mean", "prefix": 1}),
    "beit": ("beit_base_patch16_224", {}, {"read": "mean", "prefix": 1}),
    "siglip": ("vit_base_patch16_siglip_224", {}, {"read": "pool", "prefix": 0}),
    "siglip mean": ("vit_base_patch16_siglip_gap_224", {}, {"read": "mean", "prefix": 0}),
    "relative positions": ("vit_relpos_small_patch16_224", {}, {"read": "mean", "prefix": 0}),
    "relative positions, class token": ("vit_relpos_base_patch16_cls_224", {}, {"read": "class"}),
    "registers, mean": ("vit_medium_patch16_reg4_gap_256", {}, {"read": "mean", "prefix": 4}),
    "parallel scaling block": ("vit_pwee_patch16_reg1_gap_256", {}, {"read": "mean", "prefix": 1}),
    "parallel things block": (
        "vit_small_patch16_18x2_224",
        {},
        {"read": "class", "parallel": 2},
    ),
    "mean with the class token": ("vit_tiny_patch16_224", {"global_pool": "avg"}, {"read": "mean"}),
    "qwen3": ("qwen3_vit_88m", {}, {"read": "mean", "prefix": 0}),
    "clip": ("vit_base_patch16_clip_224", {}, {"read": "class"}),
    "query and key norm": ("vit_tiny_patch16_224", {"qk_norm": True}, {"read": "class"}),
}


@pytest.mark.parametrize("family", TIMM)
def test_timm(family):
    name, options, how = TIMM[family]
    assert_exact(seeded(timm.create_model, name, **{**SMALL, **options}), pictures(), **how)


@pytest.mark.parametrize("kind", ["gap", "reg4_gap"])
def test_timm_naflex_on_square_images(kind):
    config = timm.models.naflexvit.NaFlexVitCfg(
        patch_size=8,
        embed_dim=48,
        depth=3,
        num_heads=3,
        reg_tokens=4 if kind == "reg4_gap" else 0,
        global_pool="avg",
    )
    model = seeded(timm.models.naflexvit.NaFlexVit, config, num_classes=CLASSES, img_size=32)
    assert_exact(model, pictures(), read="mean", prefix=4 if kind == "reg4_gap" else 0)


def test_timm_gemma():
    model = seeded(
        timm.create_model,
        "gemma4_vit_167m",
        embed_dim=48,
        depth=2,
        num_heads=3,
        num_classes=CLASSES,
        patch_size=8,
    )
    assert_exact(model, pictures(2, 48, 48), read="mean", prefix=0, grid=(6, 6))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vit_tiny_patch16_224", {**SMALL, "global_pool": "max"}, "different weights"),
        ("vit_tiny_patch16_224", {**SMALL, "global_pool": "avgmax"}, "different weights"),
        (
            "vit_tiny_patch16_224",
            {**SMALL, "global_pool": "prr", "class_token": False},
            "pools without parameters",
        ),
        (
            "xcit_nano_12_p16_224",
            {"depth": 1, "num_classes": CLASSES, "img_size": 64},
            r"blocks.0.attn \(XCA\) attends over channels",
        ),
        ("convit_tiny", {"depth": 1, "num_classes": CLASSES, "img_size": 64}, "by hand .*GPSA"),
        ("resnet10t", {"num_classes": CLASSES}, "no attention seen"),
        ("mixer_s32_224", {"num_classes": CLASSES, "img_size": 64}, "no attention seen"),
        (
            "qwen3_vit_88m_merge",
            {"embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": CLASSES},
            "different weights",
        ),
    ],
)
def test_timm_refused_by_name(name, options, message):
    model = seeded(timm.create_model, name, **options)
    jitter(model)
    size = options.get("img_size", 64)
    with pytest.raises(UnsupportedModelError, match=message):
        gmar(model, pictures(1, size, size))


class OwnHead(nn.Module):
    def __init__(self, mean, **options):
        super().__init__()
        self.backbone = timm.create_model("vit_tiny_patch16_224", **{**SMALL, "num_classes": 0, **options})
        self.head, self.mean = nn.Sequential(nn.Dropout(0.1), nn.Linear(48, CLASSES)), mean

    def forward(self, images):
        tokens = self.backbone.forward_features(images)
        return self.head(tokens[:, 1:].mean(1) if self.mean else tokens[:, 0])


def test_timm_backbone_under_an_own_head():
    for mean in (True, False):
        model = seeded(OwnHead, mean)
        assert_exact(model, pictures(), read="mean" if mean else "class")
        assert gmar(model, pictures()).layers[0] == "backbone.blocks.0.attn"
    whole = seeded(
        lambda: nn.Sequential(
            timm.create_model("vit_tiny_patch16_224", **{**SMALL, "num_classes": 0}), nn.Linear(48, CLASSES)
        )
    )
    assert_exact(whole, pictures(), read="class")


@pytest.mark.parametrize("size", [(32, 48), (56, 24)])
def test_timm_dynamic_sizes(size):
    model = seeded(timm.create_model, "vit_tiny_patch16_224", dynamic_img_size=True, **SMALL)
    assert_exact(model, pictures(2, *size), grid=(size[0] // 8, size[1] // 8))
    rope = seeded(timm.create_model, "vit_small_patch16_dinov3", dynamic_img_size=True, **SMALL)
    assert_exact(rope, pictures(2, *size), grid=(size[0] // 8, size[1] // 8), read="mean", prefix=5)


def test_timm_padded_to_whole_patches():
    model = seeded(
        timm.create_model, "vit_tiny_patch16_224", dynamic_img_size=True, dynamic_img_pad=True, **SMALL
    )
    assert_exact(model, pictures(2, 30, 41), grid=(4, 6))


def test_torchvision_and_its_zero_head():
    model = seeded(torchvision.models.VisionTransformer, 32, 8, 3, 3, 48, 96, num_classes=CLASSES)
    assert (model.heads.head.weight == 0).all()
    found, expected = gmar(model, pictures(), rollout="flow"), reference(model, pictures(), rollout="rollout")
    assert (found.importance == 0).all()
    assert relative_error(found.heatmaps.flatten(1), expected.row[:, 1:]) < 1e-5
    assert_exact(model, pictures())
    assert found.layers[0] == "encoder.layers.encoder_layer_0.self_attention"


HF = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 96,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": CLASSES,
}
HUGGING_FACE = {
    "vit": ("ViTConfig", "ViTForImageClassification", {}, {"read": "class"}),
    "deit": ("DeiTConfig", "DeiTForImageClassification", {}, {"read": "class", "prefix": 2}),
    "deit teacher": (
        "DeiTConfig",
        "DeiTForImageClassificationWithTeacher",
        {},
        {"read": rows(18, {0: 0.5, 1: 0.5}), "prefix": 2},
    ),
    "dinov2": (
        "Dinov2Config",
        "Dinov2ForImageClassification",
        {},
        {"read": rows(17, {0: 0.5, **dict.fromkeys(range(1, 17), 0.5 / 16)})},
    ),
    "dinov2 with registers": (
        "Dinov2WithRegistersConfig",
        "Dinov2WithRegistersForImageClassification",
        {"num_register_tokens": 4},
        {"read": rows(21, {0: 0.5, **dict.fromkeys(range(5, 21), 0.5 / 16)}), "prefix": 5},
    ),
    "dinov3": ("DINOv3ViTConfig", None, {"num_register_tokens": 4}, {"read": "class", "prefix": 5}),
    "siglip": ("SiglipConfig", "SiglipForImageClassification", {}, {"read": "mean", "prefix": 0}),
    "clip": ("CLIPConfig", "CLIPForImageClassification", {}, {"read": "mean", "prefix": 1}),
}


class Dinov3Classifier(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.backbone = transformers.DINOv3ViTModel(config)
        self.head = nn.Linear(48, CLASSES)

    def forward(self, images):
        return self.head(self.backbone(images).pooler_output)


def hugging_face(family, implementation):
    config_name, model_name, options, how = HUGGING_FACE[family]
    if config_name in ("SiglipConfig", "CLIPConfig"):
        vision = {key: value for key, value in HF.items() if key != "num_labels"}
        config = getattr(transformers, config_name)(vision_config=vision, num_labels=CLASSES)
    else:
        config = getattr(transformers, config_name)(**HF, **options)
    config._attn_implementation = implementation
    build = Dinov3Classifier if model_name is None else getattr(transformers, model_name)
    return seeded(build, config), how


@pytest.mark.parametrize("family", HUGGING_FACE)
def test_hugging_face(family):
    model, how = hugging_face(family, "sdpa")
    assert_exact(model, pictures(), **how)
    found = gmar(model, pictures())
    for other in ("eager", "flex_attention"):
        switched, _ = hugging_face(family, other)
        switched.load_state_dict(model.state_dict())
        configs = [m.config for m in switched.modules() if hasattr(m, "config")]
        before = [config._attn_implementation for config in configs]
        assert other in before
        assert torch.equal(gmar(switched, pictures()).heatmaps, found.heatmaps)
        assert [config._attn_implementation for config in configs] == before


def test_hugging_face_mapping_of_inputs():
    model, _ = hugging_face("vit", "sdpa")
    images = pictures(3)
    found = gmar(model, {"pixel_values": images}, micro_batch_size=2)
    torch.testing.assert_close(found.heatmaps, gmar(model, images).heatmaps, rtol=1e-5, atol=1e-6)
    wide = pictures(2, 32, 48)
    found = gmar(model, {"pixel_values": wide, "interpolate_pos_encoding": True})
    assert found.heatmaps.shape == (2, 4, 6)


def test_hugging_face_two_towers():
    config = transformers.CLIPConfig(
        vision_config={k: v for k, v in HF.items() if k != "num_labels"},
        text_config={
            "hidden_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "intermediate_size": 96,
            "vocab_size": 50,
            "max_position_embeddings": 8,
            "eos_token_id": 49,
        },
        projection_dim=16,
    )

    class ZeroShot(nn.Module):
        def __init__(self):
            super().__init__()
            self.clip = transformers.CLIPModel(config)
            self.register_buffer("text", torch.randint(0, 49, (CLASSES, 6)))

        def forward(self, images):
            return self.clip(pixel_values=images, input_ids=self.text).logits_per_image

    class Vision(nn.Module):
        """The same logits from text features that are computed beforehand."""

        def __init__(self, whole):
            super().__init__()
            self.clip = whole.clip
            with torch.no_grad():
                found = whole.clip(pixel_values=pictures(1), input_ids=whole.text)
            self.register_buffer("text", found.text_embeds)

        def forward(self, images):
            features = self.clip.get_image_features(images).pooler_output
            features = features / features.norm(dim=-1, keepdim=True)
            return features @ self.text.T * self.clip.logit_scale.exp()

    model = seeded(ZeroShot)
    alone = Vision(model)
    for batch in (2, CLASSES):
        found, expected = gmar(model, pictures(batch)), reference(alone, pictures(batch), grid=(4, 4))
        assert relative_error(found.heatmaps, expected.heatmaps) < 1e-5
        assert len(found.layers) == len(expected.importance)
