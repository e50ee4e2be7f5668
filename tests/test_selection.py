"""Probe images that people choose: a folder, indices, the hardest, the mistaken."""

import json

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from torch.nn import functional
from torch.utils.data import DataLoader

from gmar_lightning import History
from gmar_lightning.arguments import ConfigurationError
from gmar_lightning.callback import GMARCallback
from gmar_lightning.monitor.selection import checked_choice, files_of, plain_preparation
from gmar_lightning.show.compare import compare
from tests.helpers.tiny import Classifier, Images, Rows, fit, loaders, run_and_digest, watcher


class Pictures(Rows):
    """Keeps captions."""

    def __init__(self):
        super().__init__()
        self.captions = {}

    def log_image(self, key, images, step, caption):
        self.captions.setdefault(key, caption)


@pytest.fixture
def folder(tmp_path):
    """Three files in each of two classes, of odd shapes."""
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "files" / name).mkdir(parents=True)
        for index in range(3):
            pixels = rng.integers(0, 256, (20 + index, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "files" / name / f"{index}.png")
    return tmp_path / "files"


def train(tmp_path, module=None, data=None, **settings):
    logger = Pictures()
    callback = watcher(tmp_path, num_images=4, **settings)
    fit(
        tmp_path, module or Classifier(), data or loaders(), callbacks=[callback], logger=logger, max_epochs=1
    )
    return History.load(tmp_path / "gmar"), logger.captions, callback.watches[0].prober.probe


def test_a_folder_gives_files_classes_and_captions(tmp_path, folder):
    history, captions, probe = train(tmp_path, probe_images=folder, class_names=["ant", "cat", "bee", "dog"])
    assert history.run["image_names"] == ["cat/0.png", "dog/0.png", "cat/1.png", "dog/1.png"]
    assert history.run["labels"] == [1, 3, 1, 3]
    assert captions["gmar/heatmaps"][0].startswith("#0 cat/0.png cat → ")
    expected = (
        Image.open(folder / "cat" / "0.png").resize((32, 16), Image.Resampling.BICUBIC).crop((8, 0, 24, 16))
    )
    pixels = torch.from_numpy(np.asarray(expected, dtype=np.float32) / 255).permute(2, 0, 1)
    cfg = Classifier().net.pretrained_cfg if hasattr(Classifier().net, "pretrained_cfg") else {}
    if cfg and cfg.get("mean"):
        pixels = (pixels - torch.tensor(cfg["mean"])[:, None, None]) / torch.tensor(cfg["std"])[:, None, None]
    torch.testing.assert_close(probe.images[0], pixels)


def test_the_validation_sets_own_transform_is_used(tmp_path, folder):
    class WithTransform(Images):
        def transform(self, photograph):
            assert photograph.mode == "RGB"
            return torch.full((3, 16, 16), float(photograph.height))

    data = DataLoader(Images(32), 4), DataLoader(WithTransform(16), 8)
    _, _, probe = train(tmp_path, data=data, probe_images=folder, class_names=["cat", "dog"])
    assert [float(image.mean()) for image in probe.images] == [20, 20, 21, 21]


def test_indices_are_taken_in_their_order(tmp_path):
    indices = [9, 2, 11]
    _, captions, probe = train(tmp_path, probe_images=indices)
    torch.testing.assert_close(probe.images, Images(16, seed=1).images[indices])
    assert probe.labels.tolist() == [index % 4 for index in indices]
    assert captions["gmar/heatmaps"][1].startswith("#1 image 2 2 → ")


@pytest.mark.parametrize("choice", ["hardest", "misclassified"])
def test_the_hardest_and_the_mistaken_of_the_model_before_training(tmp_path, choice):
    torch.manual_seed(3)
    module = Classifier()
    images, labels = Images(16, seed=1).images, Images(16, seed=1).classes
    with torch.no_grad():
        logits = module.eval()(images)
    module.train()
    losses = functional.cross_entropy(logits, labels, reduction="none")
    expected = losses.argsort(descending=True).tolist()
    if choice == "misclassified":
        wrong = logits.argmax(-1) != labels
        expected = [i for i in expected if wrong[i]] + [i for i in expected if not wrong[i]]
    history, _, _ = train(tmp_path, module, probe_images=choice)
    assert history.run["image_names"] == [f"image {index}" for index in expected[:4]]


def test_a_resumed_run_keeps_the_images_of_its_beginning(tmp_path):
    def run(epochs, ckpt_path=None):
        torch.manual_seed(0)
        keep = ModelCheckpoint(tmp_path, save_last=True)
        watch = watcher(tmp_path, num_images=4, probe_images="hardest")
        fit(
            tmp_path, Classifier(), loaders(), callbacks=[watch, keep],
            max_epochs=epochs, enable_checkpointing=True, ckpt_path=ckpt_path,
        )  # fmt: skip
        return History.load(tmp_path / "gmar").run

    before = run(1)
    after = run(2, str(tmp_path / "last.ckpt"))
    assert after["segments"] == before["segments"]
    assert after["image_names"] == before["image_names"]


@pytest.mark.parametrize("choice", ["misclassified", [3, 1]])
def test_choosing_does_not_disturb_the_training(tmp_path, choice):
    alone, _, _ = run_and_digest(tmp_path / "a", lambda: Classifier(drop_path_rate=0.2), loaders)
    watched, _, _ = run_and_digest(
        tmp_path / "b",
        lambda: Classifier(drop_path_rate=0.2),
        loaders,
        lambda: [watcher(tmp_path / "b", probe_images=choice)],
    )
    assert watched == alone


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ("nowhere", "is no folder"),
        ([], "no list of indices"),
        ([1, -1], "no list of indices"),
        ([0.5], "no list of indices"),
        ([True], "no list of indices"),
        ([1, 1], "twice"),
        (5, "no list of indices"),
        ([3, 99], "image 99, the validation set has 16"),
    ],
)
def test_what_cannot_be_is_refused_before_the_first_step(tmp_path, choice, said):
    module = Classifier()
    with pytest.raises(ConfigurationError, match=said):
        train(tmp_path, module, probe_images=choice)
    assert module.order.indices == []


def test_folders_that_mislead_are_refused(tmp_path, folder):
    with pytest.raises(ConfigurationError, match="no class of this data"):
        train(tmp_path / "a", probe_images=folder, class_names=["ant", "bee"])
    (folder / "cat" / "3.png").write_bytes(b"no image")
    callback = watcher(tmp_path / "b", num_images=8, probe_images=folder, class_names=["cat", "dog"])
    with pytest.raises(ConfigurationError, match=r"3\.png cannot be read"):
        fit(tmp_path / "b", Classifier(), loaders(), callbacks=[callback], max_epochs=1)
    Image.new("RGB", (8, 8)).save(folder / "stray.png")
    with pytest.raises(ValueError, match="beside class folders"):
        files_of(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no images"):
        files_of(tmp_path / "empty")
    with pytest.raises(ConfigurationError, match="give one"):
        GMARCallback(probe_images=[1], probe_batch=torch.randn(2, 3, 16, 16))


def test_files_without_classes_have_no_labels(tmp_path, folder):
    history, _, _ = train(tmp_path, probe_images=str(folder / "cat"))
    assert history.run["labels"] is None
    assert history.run["image_names"] == ["0.png", "1.png", "2.png"]


def test_runs_with_the_same_images_are_compared_image_by_image(tmp_path):
    runs = []
    for name, choice in (("a", [1, 2, 3]), ("b", [1, 2, 3]), ("c", [3, 2, 1])):
        torch.manual_seed(len(runs))
        runs.append(train(tmp_path / name, probe_images=choice)[0])
    text = compare(runs, ["a", "b", "c"])
    table = text[text.index("likeness of the last maps") :].splitlines()
    assert table[1].split() == ["same", "images", "as", "a", "#0", "#1", "#2", "mean"]
    assert [line.split()[0] for line in table[3:] if line and line.split()[0] in "abc"] == ["b"]


def test_preparation_keeps_the_middle():
    photograph = Image.new("RGB", (30, 10))
    photograph.paste((255, 255, 255), (10, 0, 20, 10))
    image = plain_preparation((10, 10), None, None)(photograph)
    assert image.shape == (3, 10, 10)
    assert float(image.mean()) == 1.0


def test_a_choice_can_be_an_array():
    assert checked_choice(np.array([2, 5])) == [2, 5]
    assert checked_choice(torch.tensor([2, 5])) == [2, 5]
    assert json.dumps(checked_choice(np.array([2])))
