"""Any attention: importance and contribution equal plain autograd on maps that the models' own arithmetic shows."""

import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from gmar_lightning import GMARCallback, History, UnsupportedModelError, gmar, targets
from tests.helpers.materialised import map_gradients, per_head
from tests.helpers.networks import Attention, ViT, pictures, seeded
from tests.helpers.reference import relative_error

TOLERANCE = 1e-10


def largest(output):
    return getattr(output, "logits", output).amax(-1)


def shaken(model):
    """No weight at zero: a branch that starts at zero would hide a mistake."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model


def assert_heads_exact(model, images, layout, *, target=None, score=largest, by_hand=False, mixed=()):
    """Importance, contribution and the row of an image alone."""
    model, images = shaken(model).double(), images.double()
    found = gmar(model, images, target)
    fused = [module for module in model.modules() if hasattr(module, "fused_attn")]
    for module in fused:
        module.fused_attn = not by_hand
    expected = list(per_head(map_gradients(model, images, score, by_hand=by_hand, mixed=mixed), 3, layout))
    for module in fused:
        module.fused_attn = True
    assert len(expected) == len(found.layers)
    for layer, (importance, contribution) in enumerate(expected):
        heads = importance.shape[1]
        assert relative_error(found.importance[:, layer, :heads], importance) < TOLERANCE
        assert relative_error(found.contribution[:, layer, :heads], contribution) < TOLERANCE
        assert found.importance[:, layer, heads:].isnan().all()
    alone = gmar(model, images[1:2], target if callable(target) else found.targets[1:2])
    torch.testing.assert_close(alone.importance[0], found.importance[1], equal_nan=True, rtol=1e-9, atol=0)
    return found


FAMILIES = {
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"depths": (1, 2, 2, 2), "img_size": 64, "window_size": 4, "embed_dim": 24},
        "bh",
        "last stage, 2 x 2",
    ),
    "maxvit": (
        "maxvit_tiny_tf_224",
        {"img_size": 64, "depths": (1, 1, 1, 1), "embed_dim": (32, 32, 64, 64)},
        "bh",
        "last stage, 2 x 2",
    ),
    "hiera": ("hiera_tiny_224", {"img_size": (64, 64), "stages": (1, 1, 2, 2)}, "bhw", "last stage, 2 x 2"),
    "pvt": ("pvt_v2_b0", {}, "bh", "none"),
    "pit": ("pit_ti_224", {"img_size": 64}, "bh", "none"),
    "differential": (
        "vit_dwee_patch16_reg1_gap_256",
        {"img_size": 64, "depth": 2, "embed_dim": 48, "num_heads": 3},
        "bh",
        "none",
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_timm_families(family):
    name, options, layout, scope = FAMILIES[family]
    model = seeded(timm.create_model, name, num_classes=5, **options)
    found = assert_heads_exact(model, pictures(3, 64, 64), layout)
    assert found.scope.startswith(scope)
    assert (found.heatmaps is None) == (scope == "none")
    if family == "differential":
        assert found.layers[:2] == ("blocks.0.attn:0", "blocks.0.attn:1")


def test_levit_and_its_last_stage():
    model = seeded(timm.create_model, "levit_128s", num_classes=5)
    found = assert_heads_exact(model, pictures(3, 224, 224), "bh", by_hand=True)
    assert found.scope == "last stage, 4 x 4"


def test_talking_heads():
    """The map that multiplies the values is the one behind the last mixing."""
    model = seeded(timm.create_model, "cait_xxs24_224", depth=2, img_size=64, num_classes=5).double()
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "gamma_1"):
                module.gamma_1.fill_(0.5)
    images = pictures(3, 64, 64).double()
    found = gmar(model, images)
    pairs = map_gradients(
        model, images, largest, by_hand=True, mixed=[block.attn.proj_w for block in model.blocks]
    )
    for layer, (_, grad) in enumerate(pairs):
        expected = grad.abs().sum((1, 2))
        assert relative_error(found.importance[:, layer], expected) < TOLERANCE


def test_channel_attention_is_refused_by_name():
    model = seeded(timm.create_model, "xcit_nano_12_p16_224", depth=2, img_size=64, num_classes=5)
    with pytest.raises(UnsupportedModelError, match=r"XCA\) attends over channels"):
        gmar(model, pictures(3, 64, 64))


class Matmul(Attention):
    def mix(self, q, k, v):
        return (q @ k.transpose(-2, -1) * self.head_dim**-0.5).softmax(-1) @ v

    def forward(self, x):
        return self.proj(self.mix(*self.qkv(x)).transpose(1, 2).flatten(2))


class Einsum(Matmul):
    def mix(self, q, k, v):
        scores = torch.einsum("bhid,bhjd->bhij", q, k) * self.head_dim**-0.5
        return torch.einsum("...ij,...jd->...id", F.dropout(F.softmax(scores, -1), 0.1, self.training), v)


class TokensFirst(Matmul):
    def mix(self, q, k, v):
        scores = torch.einsum("bhid,bhjd->bhij", q, k) * self.head_dim**-0.5
        v = v.transpose(1, 2)
        return torch.einsum("bhij,bjhd->bihd", torch.softmax(scores, dim=-1), v).transpose(1, 2)


class Merged(Matmul):
    def mix(self, q, k, v):
        shape = q.shape
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        scores = torch.baddbmm(torch.zeros(1, 1, 1).to(q), q, k.mT, beta=0, alpha=self.head_dim**-0.5)
        return torch.bmm(nn.Softmax(dim=-1)(scores), v).view(shape)


class HeadsOutermost(Matmul):
    def mix(self, q, k, v):
        q, k, v = (x.transpose(0, 1).flatten(0, 1) for x in (q, k, v))
        attention = torch.bmm(q, k.mT).mul(self.head_dim**-0.5).softmax(-1)
        return torch.bmm(attention, v).unflatten(0, (self.heads, -1)).transpose(0, 1)


class ValuesFirst(Matmul):
    def mix(self, q, k, v):
        attention = F.softmax((q * self.head_dim**-0.5) @ k.mT, dim=-1, dtype=torch.float64)
        return (v.mT @ attention.to(v.dtype).mT).mT


@pytest.mark.parametrize("kind", [Matmul, Einsum, TokensFirst, Merged, HeadsOutermost, ValuesFirst])
def test_softmax_by_hand(kind):
    """Written by hand, the model is the same function as with the fused kernel: all numbers and maps are equal."""
    by_hand, fused = seeded(ViT, attention=kind).double(), seeded(ViT).double()
    images = pictures(3).double()
    found, expected = (
        gmar(model, images, rollout=("gradient", "paper", "flow")) for model in (by_hand, fused)
    )
    assert relative_error(found.importance, expected.importance) < TOLERANCE
    assert relative_error(found.contribution, expected.contribution) < TOLERANCE
    for form, maps in expected.maps.items():
        assert relative_error(found.maps[form], maps) < TOLERANCE


def test_softmax_that_is_no_function_is_refused():
    class Exponentials(Matmul):
        def mix(self, q, k, v):
            weights = (q @ k.mT * self.head_dim**-0.5).exp()
            return weights / weights.sum(-1, keepdim=True) @ v

    with pytest.raises(UnsupportedModelError):
        gmar(seeded(ViT, attention=Exponentials), pictures())


class LinearAttention(Matmul):
    def mix(self, q, k, v):
        return q.softmax(-1) @ (k.softmax(-2).mT @ v)


def test_linear_attention_with_softmaxes_is_refused():
    with pytest.raises(UnsupportedModelError, match="by hand"):
        gmar(seeded(ViT, attention=LinearAttention), pictures())


def segformer():
    config = transformers.SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[16, 32], num_attention_heads=[1, 2],
        patch_sizes=[7, 3], strides=[4, 2], mlp_ratios=[2, 2], decoder_hidden_size=16, num_labels=4,
    )  # fmt: skip
    return seeded(transformers.SegformerForSemanticSegmentation, config)


def test_segformer_mask():
    target = targets.MaskLogit(2)
    assert_heads_exact(segformer(), pictures(3, 64, 64), "bh", target=target, score=target, by_hand=False)


def test_clip_similarity():
    config = transformers.CLIPVisionConfig(
        hidden_size=48, num_hidden_layers=3, num_attention_heads=3, intermediate_size=96, image_size=32,
        patch_size=8, projection_dim=16,
    )  # fmt: skip
    target = targets.Similarity(torch.randn(16, generator=torch.Generator().manual_seed(3)), "a cat")
    model = seeded(transformers.CLIPVisionModelWithProjection, config)
    found = assert_heads_exact(model, pictures(3), "bh", target=target, score=target)
    assert found.scope == "whole"
    assert found.logits is None
    assert found.targets is None
    assert found.score.shape == (3,)


def test_regression_head():
    target = targets.Regression(0, sign=-1)
    model = seeded(ViT)
    model.head = seeded(nn.Linear, 24, 1)
    found = assert_heads_exact(model, pictures(3), "bh", target=target, score=lambda output: -output[:, 0])
    assert found.heatmaps.shape == (3, 4, 4)


class Detector(nn.Module):
    """Queries that attend to themselves and to the image's tokens, as in DETR."""

    def __init__(self):
        super().__init__()
        self.body, self.queries = ViT(), nn.Parameter(torch.randn(5, 24))
        layer = nn.TransformerDecoderLayer(24, 3, 48, dropout=0.0, batch_first=True)
        self.decoder = nn.TransformerDecoder(layer, 2)
        self.classes = nn.Linear(24, 4)

    def forward(self, images):
        queries = self.decoder(self.queries.expand(len(images), -1, -1), self.body.features(images))
        return {"pred_logits": self.classes(queries)}


def test_detection_with_cross_attention():
    target = targets.DetectionScore(query=1)
    model, images = seeded(Detector).double(), pictures(3).double()
    found = gmar(model, images, target)
    pairs = list(per_head(map_gradients(model, images, target), 3, "bh"))
    # The first attention of the queries to themselves does not see the images.
    assert [name for name in found.layers if "decoder" in name] == [
        "decoder.layers.0.multihead_attn",
        "decoder.layers.1.self_attn",
        "decoder.layers.1.multihead_attn",
    ]
    for layer, (importance, _) in enumerate([*pairs[:3], *pairs[4:]]):
        assert relative_error(found.importance[:, layer], importance) < TOLERANCE


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (lambda output: output, r"returned a tensor of shape \(2, 5\).*expected a tensor of shape \(2,\)"),
        (lambda output: output.detach()[:, 0], "cannot be differentiated"),
        (lambda output: output.argmax(-1), "cannot be differentiated"),
        (lambda output: output["masks"], "failed on what the model returned, a tensor of shape"),
        (lambda output: output.softmax(0)[:, 0], "depends on the other images of the batch"),
        (targets.DetectionScore(query=0), r"expected \(batch, queries, classes\)"),
        (targets.ClassLogit(9), "no class 9"),
    ],
)
def test_targets_that_do_not_work_say_what_was_returned(target, message):
    with pytest.raises(UnsupportedModelError, match=message):
        gmar(seeded(ViT), pictures(), target)


def test_a_class_logit_as_target_is_the_class():
    model, images = seeded(ViT), pictures()
    named, plain = gmar(model, images, targets.ClassLogit([1, 3])), gmar(model, images, torch.tensor([1, 3]))
    torch.testing.assert_close(named.importance, plain.importance)
    torch.testing.assert_close(named.heatmaps, plain.heatmaps)
    in_parts = gmar(model, images, targets.ClassLogit([1, 3]), micro_batch_size=1)
    torch.testing.assert_close(in_parts.heatmaps, plain.heatmaps)


@pytest.mark.parametrize(
    "target",
    [
        targets.ClassLogit(1),
        targets.MaskLogit(1, mask=torch.ones(2, 2)),
        targets.Similarity(torch.ones(3), "a dog"),
        targets.Regression(),
        targets.MultiLabel([0, 2]),
        targets.DetectionScore(box=(0.5, 0.5, 0.2, 0.2)),
    ],
)
def test_targets_can_be_pickled_and_say_what_they_are(target):
    assert str(pickle.loads(pickle.dumps(target))) == str(target) != object.__repr__(target)


class SwinClassifier(LightningModule):
    def __init__(self):
        super().__init__()
        options = {"depths": (1, 1, 1, 2), "img_size": 64, "window_size": 4, "embed_dim": 24}
        self.net = seeded(timm.create_model, "swin_tiny_patch4_window7_224", num_classes=4, **options)
        self.dead = False

    def forward(self, images):
        return self.net(images)

    def training_step(self, batch, batch_idx):
        if self.global_step == 12:
            attention = self.net.layers[2].blocks[0].attn
            width = attention.proj.in_features // attention.num_heads
            with torch.no_grad():
                attention.proj.weight[:, :width] = 0
                attention.proj.weight.requires_grad_(False)
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-4)


def test_the_callback_watches_a_swin_and_flags_a_dead_head(tmp_path):
    images = pictures(16, 64, 64)
    rows = [(images[index], index % 4) for index in range(16)]
    callback = GMARCallback(every_n_train_steps=2, num_images=8, on_error="raise", save_dir=tmp_path / "gmar")
    trainer = Trainer(
        max_steps=48, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, callbacks=[callback],
    )  # fmt: skip
    trainer.fit(SwinClassifier(), DataLoader(rows, 4), DataLoader(rows, 8))
    history = History.load(tmp_path / "gmar")
    flagged = {(event["layer"], event["head"]) for event in history.events if event["kind"] == "collapsed"}
    assert flagged == {(2, 0)}
    assert history.layers[2] == "net.layers.2.blocks.0.attn"
    assert (tmp_path / "gmar" / "report.html").exists()


def test_the_callback_takes_a_scalar_and_copes_without_pictures(tmp_path):
    class Regressor(SwinClassifier):
        def __init__(self):
            super().__init__()
            self.net = seeded(timm.create_model, "pit_ti_224", num_classes=1, img_size=64, depth=(1, 1, 1))

        def training_step(self, batch, batch_idx):
            return F.mse_loss(self(batch[0])[:, 0], batch[1].float())

        def validation_step(self, batch, batch_idx):
            self.log("val/loss", self.training_step(batch, batch_idx))

    images = pictures(8, 64, 64)
    rows = [(images[index], index % 4) for index in range(8)]
    callback = GMARCallback(
        every_n_train_steps=2, num_images=4, on_error="raise", save_dir=tmp_path / "gmar",
        target=targets.Regression(0),
    )  # fmt: skip
    trainer = Trainer(
        max_steps=4, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, callbacks=[callback],
    )  # fmt: skip
    trainer.fit(Regressor(), DataLoader(rows, 4), DataLoader(rows, 8))
    history = History.load(tmp_path / "gmar")
    assert history.run["settings"]["target"] == "+output 0"
    assert all(record.failure is None and len(record.scores) == 4 for record in history.records)
    assert history.records[-1].stored_maps is None
    assert (tmp_path / "gmar" / "report.html").exists()
