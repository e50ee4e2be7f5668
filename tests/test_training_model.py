import math

import lightning.pytorch as pl
import pytest
import timm
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import save_file

from gmar_lightning.training.callbacks import FreezeBackbone, ScaleLearningRate
from gmar_lightning.training.data import Digits
from gmar_lightning.training.model import Classifier
from gmar_lightning.training.optim import parameter_groups, warmup_cosine
from gmar_lightning.training.weights import load_weights, read_weights

TINY = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
NAME = "vit_tiny_patch16_224"


class FewDigits(Digits):
    """The first 64 digits of either side, in batches of 32."""

    def __init__(self, **arguments):
        super().__init__(batch_size=32, augment=False, **arguments)

    def splits(self):
        return tuple(torch.utils.data.Subset(part, range(64)) for part in super().splits())


def tiny(**arguments):
    return Classifier(NAME, image_size=32, model_args=TINY, **arguments)


def fit(model, folder, callbacks=(), epochs=1, **arguments):
    trainer = pl.Trainer(
        default_root_dir=folder,
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        callbacks=list(callbacks),
        **arguments,
    )
    trainer.fit(model, FewDigits())
    return trainer


def test_learns_one_batch(tmp_path):
    pl.seed_everything(0)
    model = tiny(lr=1e-2, weight_decay=0.0, position_std=0.5)
    trainer = fit(model, tmp_path, epochs=40, overfit_batches=1)
    # Guessing costs ln 10 = 2.3, the frequencies of 32 labels alone about 2.1.
    assert trainer.callback_metrics["train/loss"] < 1.6


def test_positions_are_spread_only_where_there_are_none_yet():
    assert tiny(position_std=0.5).model.pos_embed.std().item() == pytest.approx(0.5, rel=0.15)
    assert tiny().model.pos_embed.std().item() == pytest.approx(0.02, rel=0.15)
    with pytest.raises(ValueError, match="from scratch"):
        tiny(position_std=0.5, weights="file.pth")


def test_logs_loss_and_accuracy(tmp_path):
    trainer = fit(tiny(), tmp_path)
    logged = trainer.callback_metrics
    assert {"train/loss", "val/loss", "val/accuracy"} <= set(logged)
    model = trainer.lightning_module.eval()
    batches = list(trainer.val_dataloaders)
    hits = torch.cat([model(images).argmax(dim=1) == labels for images, labels in batches])
    assert logged["val/accuracy"] == pytest.approx(hits.float().mean().item())


def test_checkpoint_rebuilds_the_model_by_itself(tmp_path):
    file = tmp_path / "start.safetensors"
    save_file(tiny().model.state_dict(), file)
    checkpoint = ModelCheckpoint(dirpath=tmp_path, filename="end")
    trainer = fit(tiny(weights=str(file)), tmp_path, [checkpoint])
    file.unlink()
    loaded = Classifier.load_from_checkpoint(tmp_path / "end.ckpt", map_location="cpu").eval()
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(loaded(images), trainer.lightning_module.eval()(images))
    assert loaded.class_names == list("0123456789")
    assert loaded.image_size == 32
    # Digits was told no normalisation, so it took the model's own.
    assert loaded.mean == [0.5, 0.5, 0.5] == trainer.datamodule.mean
    # The running model still knows where it started.
    assert trainer.lightning_module.hparams["weights"] == str(file)


def test_checkpoint_of_a_pretrained_model_fetches_nothing(tmp_path, monkeypatch):
    def random_instead(name, arguments):
        return timm.create_model(name, **arguments)

    monkeypatch.setattr("gmar_lightning.training.model.create_pretrained", random_instead)
    fit(tiny(pretrained=True), tmp_path, [ModelCheckpoint(dirpath=tmp_path, filename="end")])
    monkeypatch.setattr("gmar_lightning.training.model.create_pretrained", None)
    assert not Classifier.load_from_checkpoint(tmp_path / "end.ckpt").hparams["pretrained"]


def test_pretrained_without_a_connection_says_what_to_do(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RuntimeError, match=r"could not be fetched .*model\.weights"):
        Classifier(NAME, pretrained=True)


def test_two_sources_of_weights_are_refused():
    with pytest.raises(ValueError, match="give one"):
        Classifier(NAME, pretrained=True, weights="file.pth")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".ckpt"])
def test_weights_come_back_from_every_format(tmp_path, suffix):
    source = tiny().model
    file = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file({key: value.half() for key, value in source.state_dict().items()}, file)
    elif suffix == ".pth":
        torch.save({"model": {f"module.{k}": v for k, v in source.state_dict().items()}}, file)
    else:
        torch.save(
            {"state_dict": {f"model.{k}": v for k, v in source.state_dict().items()}, "epoch": 3}, file
        )
    target = tiny().model
    load_weights(target, file)
    assert target.head.weight.dtype == torch.float32
    for key, value in source.state_dict().items():
        torch.testing.assert_close(target.state_dict()[key], value, atol=1e-3, rtol=1e-3)


def test_head_for_other_classes_is_left_out_and_reported(tmp_path, caplog):
    file = tmp_path / "weights.pth"
    source = tiny().model
    torch.save(source.state_dict(), file)
    target = tiny(num_classes=3).model
    with caplog.at_level("INFO"):
        load_weights(target, file)
    assert "newly initialised: head.weight, head.bias" in caplog.text
    assert torch.equal(target.blocks[1].attn.qkv.weight, source.blocks[1].attn.qkv.weight)


def test_positions_are_resized_for_another_image_size(tmp_path):
    source = tiny().model
    # One channel rises from left to right over the 4 x 4 grid.
    grid = torch.linspace(-1, 1, 4).expand(4, 4).reshape(1, 16)
    source.pos_embed.data[0, 1:, 0] = grid
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    larger = Classifier(NAME, image_size=64, model_args=TINY, weights=str(tmp_path / "weights.safetensors"))
    resized = larger.model.pos_embed[0, 1:, 0].reshape(8, 8)
    torch.testing.assert_close(resized, resized[:1].expand(8, 8), atol=1e-5, rtol=0)
    assert (resized[0].diff() > 0).all()
    torch.testing.assert_close(larger.model.pos_embed[0, 0], source.pos_embed[0, 0])


def test_missing_and_unexpected_names_are_reported(tmp_path):
    state = tiny().model.state_dict()
    del state["norm.bias"]
    state["decoder.weight"] = torch.zeros(1)
    torch.save(state, tmp_path / "weights.pth")
    with pytest.warns(UserWarning, match=r"initialised: norm\.bias\..*not used: decoder\.weight\."):
        load_weights(tiny().model, tmp_path / "weights.pth")


def test_weights_of_another_model_are_refused(tmp_path):
    torch.save(
        timm.create_model(NAME, img_size=32, **{**TINY, "embed_dim": 48}).state_dict(), tmp_path / "a.pth"
    )
    with pytest.raises(
        ValueError, match=r"another model: .*blocks\.0\.attn\.proj\.weight \(48, 48\), model \(24, 24\)"
    ):
        load_weights(tiny().model, tmp_path / "a.pth")
    torch.save({"conv.weight": torch.zeros(2)}, tmp_path / "b.pth")
    with pytest.raises(ValueError, match="fits no parameter of the model"):
        load_weights(tiny().model, tmp_path / "b.pth")


def test_unreadable_weights_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no weights file"):
        read_weights(tmp_path / "none.pth")
    for name in ("a.pth", "a.safetensors"):
        (tmp_path / name).write_bytes(b"neither a pickle nor safetensors")
        with pytest.raises(ValueError, match=name):
            read_weights(tmp_path / name)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="no tensors by name"):
        read_weights(tmp_path / "list.pth")


def test_layer_decay_lowers_the_rate_towards_the_input():
    model = tiny().model
    groups = parameter_groups(model, lr=1.0, weight_decay=0.1, layer_decay=0.5)
    rate = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert len(rate) == len(list(model.parameters()))
    assert rate[id(model.head.weight)] == 1
    assert rate[id(model.blocks[1].attn.qkv.weight)] == 2 * rate[id(model.blocks[0].attn.qkv.weight)]
    assert rate[id(model.blocks[0].attn.qkv.weight)] == 2 * rate[id(model.patch_embed.proj.weight)]


def test_weight_decay_spares_biases_and_can_differ_by_name():
    model = tiny().model
    groups = parameter_groups(model, lr=1.0, weight_decay=0.1, weight_decay_of={".attn.": 5.0})
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert len(decay) == len(list(model.parameters()))
    expected = {"blocks.0.attn.qkv.weight": 5.0, "blocks.0.attn.qkv.bias": 0.0}
    expected |= {"blocks.0.mlp.fc1.weight": 0.1, "pos_embed": 0.0, "norm.weight": 0.0}
    parameters = dict(model.named_parameters())
    assert {name: decay[id(parameters[name])] for name in expected} == expected
    with pytest.raises(ValueError, match="no decayed weight has 'attention'"):
        parameter_groups(model, lr=1.0, weight_decay=0.1, weight_decay_of={"attention": 1.0})
    with pytest.raises(ValueError, match="layer_decay"):
        parameter_groups(model, lr=1.0, weight_decay=0.1, layer_decay=1.5)


def test_schedule_rises_and_falls():
    factor = warmup_cosine(110, warmup=0.1, final=0.01)
    rising = [factor(step) for step in range(11)]
    assert rising == pytest.approx([(step + 1) / 12 for step in range(11)])
    assert factor(11) == pytest.approx(1)
    assert factor(11 + 33) == pytest.approx(0.01 + 0.99 * (1 + math.cos(math.pi / 3)) / 2)
    assert factor(110) == pytest.approx(0.01)
    assert factor(500) == pytest.approx(0.01)
    with pytest.raises(ValueError, match="max_epochs"):
        warmup_cosine(math.inf, 0.1)
    with pytest.raises(ValueError, match="share of the run"):
        warmup_cosine(100, 1.0)


class Watch(pl.Callback):
    """Notes, per epoch, what moved and in which mode."""

    def __init__(self):
        self.rows = []

    def on_train_epoch_start(self, trainer, pl_module):
        self.before = {name: p.detach().clone() for name, p in pl_module.model.named_parameters()}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.modes = (pl_module.model.blocks[0].training, pl_module.model.head.training)

    def on_train_epoch_end(self, trainer, pl_module):
        moved = {n for n, p in pl_module.model.named_parameters() if not torch.equal(p, self.before[n])}
        self.rows.append((moved, self.modes))


def test_backbone_freezes_then_learns(tmp_path):
    watch = Watch()
    model = tiny(drop_path=0.1, weight_decay=0.1)
    fit(model, tmp_path, [FreezeBackbone(until_epoch=1), watch], epochs=2)
    assert watch.rows[0] == ({"head.weight", "head.bias"}, (False, True))
    assert watch.rows[1] == ({name for name, _ in model.model.named_parameters()}, (True, True))


def test_linear_probe_moves_only_the_head(tmp_path):
    watch = Watch()
    fit(tiny(), tmp_path, [FreezeBackbone(), watch], epochs=2)
    assert [moved for moved, _ in watch.rows] == [{"head.weight", "head.bias"}] * 2
    with pytest.raises(ValueError, match="until_epoch"):
        FreezeBackbone(until_epoch=0)


class Rates(pl.Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])


def test_learning_rate_is_scaled_from_an_epoch_on(tmp_path):
    plain, scaled = Rates(), Rates()
    fit(tiny(), tmp_path, [plain], epochs=3)
    fit(tiny(), tmp_path, [ScaleLearningRate(epoch=1, factor=10), scaled], epochs=3)
    assert scaled.seen == pytest.approx(plain.seen[:2] + [10 * rate for rate in plain.seen[2:]])
    with pytest.raises(ValueError, match="factor"):
        ScaleLearningRate(epoch=1, factor=0)


def test_mixup_trains_on_soft_targets(tmp_path):
    pl.seed_everything(0)
    model = tiny(mixup=1.0, cutmix=0.0, label_smoothing=0.0)
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8)
    mixed, targets = model.mix(images.clone(), labels)
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(8))
    share = targets[0, 0]
    assert 0 < share < 1
    torch.testing.assert_close(mixed[0], share * images[0] + (1 - share) * images[7])
    fit(tiny(mixup=0.8, cutmix=1.0, label_smoothing=0.1), tmp_path)


def test_moving_average_is_what_gets_saved(tmp_path):
    if not hasattr(pl.callbacks, "EMAWeightAveraging"):
        pytest.skip("EMAWeightAveraging came with lightning 2.6")
    average = pl.callbacks.EMAWeightAveraging(decay=0.5)
    trainer = fit(tiny(), tmp_path, [average, ModelCheckpoint(dirpath=tmp_path, filename="end")], epochs=2)
    loaded = Classifier.load_from_checkpoint(tmp_path / "end.ckpt")
    assert loaded.class_names == list("0123456789")
    torch.testing.assert_close(loaded.model.head.weight, trainer.lightning_module.model.head.weight)


def test_bf16_runs(tmp_path):
    trainer = fit(tiny(), tmp_path, precision="bf16-mixed")
    assert math.isfinite(trainer.callback_metrics["train/loss"])


def test_third_batch_element_is_left_alone():
    model = tiny()
    batch = (torch.randn(4, 3, 32, 32), torch.arange(4), torch.ones(4, 32, 32, dtype=torch.bool))
    model.log = lambda *args, **kwargs: None
    assert math.isfinite(model.training_step(batch, 0).item())
