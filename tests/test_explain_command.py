"""`python -m gmar_lightning explain` on a checkpoint that the training side wrote."""

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from gmar_lightning.__main__ import main
from gmar_lightning.training.model import Classifier


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    small = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
    model = Classifier(num_classes=3, image_size=32, class_names=["cat", "dog", "猫"], model_args=small)
    trainer = Trainer(
        max_steps=2, logger=False, enable_checkpointing=False, accelerator="cpu", barebones=True
    )
    data = TensorDataset(torch.randn(8, 3, 32, 32), torch.arange(8) % 3)
    trainer.fit(model, DataLoader(data, 4))
    trainer.save_checkpoint(folder / "model.ckpt")
    return folder / "model.ckpt"


@pytest.fixture
def photographs(tmp_path):
    rng = np.random.default_rng(0)
    paths = []
    for name, size, mode in (
        ("a.jpg", (60, 40), "RGB"),
        ("b.png", (20, 30), "L"),
        ("c.png", (64, 64), "RGBA"),
    ):
        pixels = rng.integers(0, 255, (size[1], size[0], 4), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(tmp_path / name)
        paths.append(tmp_path / name)
    return paths


def explain(*arguments):
    return main(["explain", *map(str, arguments)])


def test_every_file_gets_a_picture(checkpoint, photographs, tmp_path, capsys):
    out = tmp_path / "out"
    assert explain(*photographs, "--checkpoint", checkpoint, "--out", out, "--heads") == 0
    assert sorted(path.name for path in out.iterdir()) == [
        f"{stem}_{kind}" for stem in "abc" for kind in ("gmar.jpg", "heads.png")
    ]
    picture = np.asarray(Image.open(out / "a_gmar.jpg"))
    half = picture.shape[1] // 2
    left, right = picture[:, : half - 4].astype(int), picture[:, -half + 4 :].astype(int)
    assert np.abs(left - right).mean() > 5, "the heat is missing"
    heads = np.asarray(Image.open(out / "a_heads.png"))
    # below the grids, a row of three heads for each of the two layers, none of them blank
    assert heads.shape[0] > 2 * 96
    assert heads.shape[1] >= 3 * 96
    tiles = heads[-12 - 96 - 6 : -12 - 6, : 3 * (96 + 6)].astype(int)
    assert np.ptp(tiles[:, 6:-6], axis=(0, 1)).min() > 60
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 3
    assert any(name in printed[0] for name in ("cat", "dog", "猫"))


def test_target_by_name_and_by_index_are_the_same_map(checkpoint, photographs, tmp_path, capsys):
    for number, target in enumerate(("dog", "1", "cat")):
        out = tmp_path / str(number)
        options = ("--target", target, "--rollout", "gradient", "--out", out)
        assert explain(photographs[0], "--checkpoint", checkpoint, *options) == 0
    by_name, by_index, other = ((tmp_path / str(n) / "a_gmar.jpg").read_bytes() for n in range(3))
    assert by_name == by_index != other


def test_unreadable_files_are_named_and_skipped(checkpoint, photographs, tmp_path, capsys):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    code = explain(
        photographs[0], broken, tmp_path / "missing.jpg", "--checkpoint", checkpoint, "--out", tmp_path
    )
    assert code == 1
    said = capsys.readouterr().err
    assert "broken.jpg: skipped" in said
    assert "missing.jpg: skipped" in said
    assert (tmp_path / "a_gmar.jpg").exists()


def test_files_of_one_name_do_not_overwrite_each_other(checkpoint, photographs, tmp_path):
    twin = tmp_path / "other" / "a.jpg"
    twin.parent.mkdir()
    Image.open(photographs[2]).convert("RGB").save(twin)
    assert explain(photographs[0], twin, "--checkpoint", checkpoint, "--out", tmp_path / "out") == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"a_gmar.jpg", "a_2_gmar.jpg"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--checkpoint", "nowhere.ckpt"), "nowhere.ckpt: cannot be used"),
        (("--checkpoint", "CKPT", "--target", "horse"), "cat, dog, 猫"),
        (("--checkpoint", "CKPT", "--target", "7"), "3 classes"),
    ],
)
def test_what_cannot_work_says_so_and_exits_with_2(checkpoint, photographs, tmp_path, capsys, options, said):
    options = [str(checkpoint) if option == "CKPT" else option for option in options]
    assert explain(photographs[0], *options, "--out", tmp_path) == 2
    assert said in capsys.readouterr().err
