import lightning.pytorch as pl
import pytest
import torch

from gmar_lightning import gmar
from gmar_lightning.training.data import Digits
from gmar_lightning.training.evidence import EvidenceShare
from gmar_lightning.training.model import Classifier
from gmar_lightning.training.planted import Cells


def fit(data, folder, callback):
    pl.seed_everything(0)
    model = Classifier(
        image_size=32, model_args={"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    )
    trainer = pl.Trainer(
        default_root_dir=folder,
        max_epochs=1,
        limit_train_batches=2,
        limit_val_batches=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callback,
    )
    trainer.fit(model, data)
    return trainer


def test_share_of_the_heat_in_the_digits_cell(tmp_path):
    trainer = fit(Cells(copies=1), tmp_path, EvidenceShare(num_images=4))
    logged = trainer.callback_metrics
    items = [trainer.datamodule.val_set[index] for index in range(4)]
    shares = []
    for image, label, mask in items:
        heat = gmar(trainer.lightning_module, image[None], label[None]).heatmaps[0]
        shares.append((heat * mask[::8, ::8]).sum() / heat.sum())
    assert logged["val/evidence_gmar"] == pytest.approx(torch.stack(shares).mean().item(), rel=1e-4)
    assert {"val/evidence_rollout", "val/evidence_paper", "val/evidence_last_layer"} <= set(logged)
    assert logged["val/evidence_rollout"] != logged["val/evidence_paper"]


def test_needs_masks(tmp_path):
    with pytest.raises(ValueError, match="image, label, mask"):
        fit(Digits(), tmp_path, EvidenceShare())
    with pytest.raises(ValueError, match="num_images"):
        EvidenceShare(num_images=0)
