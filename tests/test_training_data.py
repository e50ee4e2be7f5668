import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from gmar_lightning.training.data import Digits, stratified_split
from gmar_lightning.training.downloads import Cifar10, Cifar100, OxfordPets
from gmar_lightning.training.folder import ImageFolder
from gmar_lightning.training.planted import Cells, WatermarkedDigits

HALF = {"mean": [0.5] * 3, "std": [0.5] * 3}


def write_photographs(folder, name, count, colour=(200, 30, 30), size=(40, 30)):
    (folder / name).mkdir(parents=True)
    for index in range(count):
        Image.new("RGB", size, colour).save(folder / name / f"{index}.jpg")


def images_of(dataset):
    return torch.stack([dataset[index][0] for index in range(len(dataset))])


def test_split_is_stratified_disjoint_and_fixed():
    labels = [0] * 50 + [1] * 30 + [2] * 20
    train, val = stratified_split(labels, 0.2, seed=3)
    assert sorted(train + val) == list(range(100))
    assert np.bincount([labels[at] for at in val]).tolist() == [10, 6, 4]
    assert (train, val) == stratified_split(labels, 0.2, seed=3)
    assert val != stratified_split(labels, 0.2, seed=4)[1]


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1.0])
def test_split_refuses_an_empty_side(fraction):
    with pytest.raises(ValueError, match="val_fraction"):
        stratified_split([0, 0, 1, 1], fraction, seed=0)


def test_digits_are_scikit_learns_upscaled_and_normalised():
    data = Digits(**HALF)
    data.setup()
    images, labels = next(iter(data.val_dataloader()))
    assert images.shape == (64, 3, 32, 32)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert len(data.train_set) + len(data.val_set) == 1797
    assert (data.num_classes, data.class_names) == (10, list("0123456789"))
    # Averaged back to 8 x 8, an upscaled digit is the original, slightly smoothed.
    small = torch.nn.functional.avg_pool2d(images[:, 0] * 0.5 + 0.5, 4).flatten(1)
    originals = torch.from_numpy(load_digits(return_X_y=True)[0]).float() / 16
    nearest = torch.cdist(small, originals).argmin(dim=1)
    assert load_digits(return_X_y=True)[1][nearest].tolist() == labels.tolist()


def test_only_training_digits_are_augmented():
    data = Digits(**HALF)
    data.setup()
    assert torch.equal(images_of(data.val_set), images_of(data.val_set))
    assert not torch.equal(data.train_set[0][0], data.train_set[0][0])


def test_normalisation_without_a_model_is_imagenets():
    data = Digits()
    data.setup()
    black = (data.val_set[0][0].flatten(1).min(dim=1).values * torch.tensor(data.std)) + torch.tensor(
        data.mean
    )
    assert data.mean[0] == pytest.approx(0.485)
    torch.testing.assert_close(black, torch.zeros(3), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "arguments", [{"image_size": 0}, {"batch_size": 0}, {"num_workers": -1}, {"mean": [0.5] * 3}]
)
def test_wrong_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match=r"image_size|mean and std"):
        Digits(**arguments)


def test_single_tree_is_split_by_class(tmp_path):
    write_photographs(tmp_path, "ant", 10, (255, 0, 0))
    write_photographs(tmp_path, "bee", 20, (0, 0, 255))
    data = ImageFolder(str(tmp_path), image_size=16, **HALF)
    data.setup()
    assert (data.num_classes, data.class_names) == (2, ["ant", "bee"])
    assert torch.bincount(data.val_set.labels).tolist() == [2, 4]
    image, label = data.val_set[0]
    assert image.shape == (3, 16, 16)
    assert label == 0
    assert image.mean(dim=(1, 2)).tolist() == pytest.approx([1, -1, -1], abs=0.03)


def test_train_and_val_folders_are_taken_as_they_are(tmp_path):
    for part, count in (("train", 3), ("val", 2)):
        write_photographs(tmp_path / part, "ant", count)
        write_photographs(tmp_path / part, "bee", count)
    (tmp_path / "val_masks").mkdir()
    data = ImageFolder(str(tmp_path), image_size=16, **HALF)
    data.setup()
    assert (len(data.train_set), len(data.val_set)) == (6, 4)


def test_classes_must_agree(tmp_path):
    write_photographs(tmp_path / "train", "ant", 1)
    write_photographs(tmp_path / "val", "bee", 1)
    with pytest.raises(ValueError, match=r"only in train: \['ant'\], only in val: \['bee'\]"):
        ImageFolder(str(tmp_path))


def test_missing_and_empty_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        ImageFolder(str(tmp_path / "nowhere"))
    (tmp_path / "ant").mkdir()
    with pytest.raises(ValueError, match=r"no images under .* folders found: ant"):
        ImageFolder(str(tmp_path))


def test_unreadable_files_are_reported_and_left_out(tmp_path):
    write_photographs(tmp_path, "ant", 5)
    write_photographs(tmp_path, "bee", 5)
    (tmp_path / "ant" / "broken.jpg").write_bytes(b"not an image")
    data = ImageFolder(str(tmp_path), image_size=16, **HALF)
    with pytest.warns(UserWarning, match=r"1 of 11 files cannot be read .*broken\.jpg"):
        data.setup()
    assert len(data.train_set) + len(data.val_set) == 10


def test_truncated_file_is_named_when_decoded(tmp_path):
    write_photographs(tmp_path, "ant", 5, size=(200, 200))
    write_photographs(tmp_path, "bee", 5)
    noise = np.random.default_rng(0).integers(0, 255, (200, 200, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "ant" / "0.jpg")
    whole = (tmp_path / "ant" / "0.jpg").read_bytes()
    (tmp_path / "ant" / "0.jpg").write_bytes(whole[: len(whole) // 2])
    data = ImageFolder(str(tmp_path), image_size=16, **HALF)
    data.setup()
    with pytest.raises(RuntimeError, match=r"ant.0\.jpg cannot be decoded"):
        [images_of(part) for part in (data.train_set, data.val_set)]


def test_cells_hold_one_real_digit_where_the_mask_says():
    data = Cells(copies=2, **HALF)
    data.setup()
    plain = Digits(**HALF)
    plain.setup()
    image, label, mask = data.val_set[5]
    assert mask.shape == (32, 32)
    assert mask.sum() == 256
    rows, columns = mask.nonzero().T
    corner = (rows.min().item(), columns.min().item())
    assert corner in {(0, 0), (0, 16), (16, 0), (16, 16)}
    assert label == plain.val_set[5][1]
    inside = image[:, mask].reshape(3, 16, 16)
    expected = torch.nn.functional.avg_pool2d(plain.val_set[5][0], 2)
    assert torch.corrcoef(torch.stack([inside.flatten(), expected.flatten()]))[0, 1] > 0.95


def test_cells_are_balanced_and_deterministic():
    first, second, other = Cells(copies=4), Cells(copies=4), Cells(copies=4, seed=1)
    for data in (first, second, other):
        data.setup()
    assert torch.equal(first.train_set.images, second.train_set.images)
    assert not torch.equal(first.train_set.images, other.train_set.images)
    quarters = first.train_set.masks[:, ::16, ::16].flatten(1).sum(dim=0)
    assert quarters.tolist() == [1437] * 4
    # The four copies of one digit stand in four different cells.
    assert first.train_set.masks[::1437, ::16, ::16].flatten(1).sum(dim=0).tolist() == [1] * 4


def test_shuffled_cells_keep_brightness_and_lose_shape():
    data = Cells(copies=1)
    data.setup()
    images, masks = data.train_set.images[:, 0].float(), data.train_set.masks
    real = images[masks].reshape(-1, 256)
    shuffled = images[~masks].reshape(-1, 256)
    assert shuffled.mean() == pytest.approx(real.mean().item(), rel=0.03)
    # All digits share an outline, so their mean image has contrast; shuffled ones do not.
    assert shuffled.mean(dim=0).std() < 0.5 * real.mean(dim=0).std()


def test_watermark_tells_the_class_or_nothing():
    for correlation, agreement in ((1.0, 1.0), (0.0, 0.1)):
        data = WatermarkedDigits(correlation=correlation)
        data.setup()
        marks = data.train_set.images[:, :, 0, 0]
        labels = data.train_set.labels
        majority = sum(
            torch.unique(marks[labels == digit], dim=0, return_counts=True)[1].max().item()
            for digit in range(10)
        )
        assert majority / len(labels) == pytest.approx(agreement, abs=0.1)
        assert data.train_set.masks[0].sum() == 16
    apart = WatermarkedDigits(correlation=1.0, val_correlation=0.0)
    apart.setup()
    assert len(torch.unique(apart.val_set.images[apart.val_set.labels == 3][:, :, 0, 0], dim=0)) > 5


@pytest.mark.parametrize("source", [Cifar10, Cifar100, OxfordPets])
def test_failed_download_says_what_to_do(source, tmp_path, monkeypatch):
    def refused(*args, **kwargs):
        raise OSError("connection refused")

    monkeypatch.setattr("urllib.request.urlopen", refused)
    with pytest.raises(RuntimeError, match=f"{source.__name__} is not in .*connection refused.*ImageFolder"):
        source(root=str(tmp_path)).prepare_data()


def test_cifar_found_on_disk_is_not_downloaded(tmp_path, monkeypatch):
    # The archive's own layout with a few images; its check sums are torchvision's business.
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (10, 3072), dtype=np.uint8)
    for name in [f"data_batch_{n}" for n in range(1, 6)] + ["test_batch"]:
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": list(range(10))}))
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    data = Cifar10(root=str(tmp_path), image_size=48, batch_size=8, **HALF)
    data.prepare_data()
    data.setup()
    images, labels = next(iter(data.val_dataloader()))
    assert images.shape == (8, 3, 48, 48)
    assert labels.tolist() == list(range(8))
    assert (len(data.train_set), data.class_names) == (50, names)
