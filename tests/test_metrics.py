"""The torchmetrics: any split into batches and processes, NaN, and a model that is only borrowed."""

import copy
import pickle
import warnings

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torchmetrics import MetricCollection

from gmar_lightning.explain import faithfulness, localisation
from gmar_lightning.explain.gmar import gmar
from gmar_lightning.metrics import (
    AverageDrop,
    AverageIncrease,
    DeletionAUC,
    EnergyInMask,
    HeadImportance,
    InsertionAUC,
    PointingGame,
    SaCo,
)

OF_MODEL = {
    InsertionAUC: (faithfulness.insertion, {"steps": 3, "baseline": "attention"}),
    DeletionAUC: (faithfulness.deletion, {"steps": 3, "baseline": "blur"}),
    AverageDrop: (faithfulness.average_drop, {"baseline": "mean"}),
    AverageIncrease: (faithfulness.average_increase, {"mean": [0.5] * 3, "std": [0.2] * 3}),
    SaCo: (faithfulness.saco, {"groups": 3, "baseline": "mean"}),
}


def small_vit():
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=(32, 48), depth=2, num_classes=4, drop_path_rate=0.2
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.5)
    return model


@pytest.fixture(scope="module")
def model():
    return small_vit()


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(6, 3, 32, 48, generator=generator)
    return images, torch.rand(6, 2, 3, generator=generator), torch.tensor([0, 1, 2, 3, 0, 1])


@pytest.mark.parametrize("kind", OF_MODEL)
def test_mean_over_images_of_any_split(model, batch, kind):
    measure, options = OF_MODEL[kind]
    metric = kind(model, **options)
    for rows in (slice(0, 1), slice(1, 5), slice(5, 6)):
        metric.update(*(part[rows] for part in batch))
    found = metric.compute()
    assert found.shape == ()
    torch.testing.assert_close(found, measure(model, *batch, **options).mean())
    assert metric.skipped == 0


def test_forward_gives_the_batch_and_accumulates(model, batch):
    metric, whole = DeletionAUC(model, steps=2), DeletionAUC(model, steps=2)
    whole.update(*batch)
    per_batch = [metric(*(part[rows] for part in batch)) for rows in (slice(0, 3), slice(3, 6))]
    torch.testing.assert_close(torch.stack(per_batch).mean(), whole.compute())
    torch.testing.assert_close(metric.compute(), whole.compute())
    metric.reset()
    assert metric.count == 0


def test_localisation_over_batches():
    heat = torch.rand(5, 2, 3)
    masks = torch.rand(5, 8, 12) > 0.6
    masks[4] = False  # no object: left out, and said so
    for kind, measure in (
        (PointingGame, localisation.pointing_game),
        (EnergyInMask, localisation.energy_in_mask),
    ):
        metric = kind()
        metric.update(heat[:2], masks[:2])
        metric.update(heat[2:], masks[2:])
        with pytest.warns(UserWarning, match="left out 1 of 5 images"):
            found = metric.compute()
        torch.testing.assert_close(found, measure(heat[:4], masks[:4]).mean())


def test_nan_heatmaps_are_left_out_and_counted(model, batch):
    images, heatmaps, targets = batch
    broken = heatmaps.clone()
    broken[2] = torch.nan
    metric = InsertionAUC(model, steps=2)
    metric.update(images, broken, targets)
    rest = [0, 1, 3, 4, 5]
    with pytest.warns(UserWarning, match="InsertionAUC left out 1 of 6"):
        found = metric.compute()
    expected = faithfulness.insertion(model, images[rest], heatmaps[rest], targets[rest], steps=2).mean()
    torch.testing.assert_close(found, expected)
    nothing = AverageDrop(model)
    nothing.update(images, torch.full_like(heatmaps, torch.nan), targets)
    with pytest.warns(UserWarning, match="6 of 6"):
        assert nothing.compute().isnan()


def test_model_is_borrowed_not_owned(model, batch):
    model.train()
    metric = InsertionAUC(model, steps=2, baseline="mean")
    assert list(metric.parameters()) == []
    assert list(metric.children()) == []
    assert metric.state_dict() == {}
    metric.eval().bfloat16().set_dtype(torch.float64)
    metric.to("meta")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert all(module.training for module in model.modules())

    metric = InsertionAUC(model, steps=2, baseline="mean")
    twin, copied = metric.clone(), copy.deepcopy(metric)
    before = torch.get_rng_state()
    for each in (metric, twin, copied):
        each.update(*batch)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    # Copies look at the same, training model, not at a frozen copy of it.
    with torch.no_grad():
        model.head.weight.neg_()
    for each in (metric, twin, copied):
        each.reset()
        each.update(*batch)
    with torch.no_grad():
        model.head.weight.neg_()
    assert metric.compute() == twin.compute() == copied.compute()
    unpickled = pickle.loads(pickle.dumps(metric))
    assert unpickled.compute() == metric.compute()


def test_inside_a_collection(model, batch):
    both = MetricCollection(
        {"insertion": InsertionAUC(model, steps=2), "deletion": DeletionAUC(model, steps=2)}
    )
    both.update(*batch)
    found = both.compute()
    torch.testing.assert_close(found["deletion"], faithfulness.deletion(model, *batch, steps=2).mean())
    torch.testing.assert_close(found["insertion"], faithfulness.insertion(model, *batch, steps=2).mean())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda m: InsertionAUC(m, baseline="grey"), ValueError, "'black', 'mean', 'blur', 'attention'"),
        (lambda m: DeletionAUC(m, steps=0), ValueError, "steps must be a positive integer"),
        (lambda m: AverageDrop(m, baseline="attention"), ValueError, "'black', 'mean', 'blur'"),
        (lambda m: AverageIncrease(m, std=[1.0]), ValueError, "mean and std belong together"),
        (lambda m: SaCo(m, groups=1), ValueError, "groups must be at least 2"),
        (lambda m: InsertionAUC(lambda x: x), TypeError, "torch.nn.Module, got function"),
        (lambda m: HeadImportance(0, 3), ValueError, "at least 1"),
    ],
)
def test_wrong_arguments_fail_when_made(model, make, error, message):
    with pytest.raises(error, match=message):
        make(model)


# --- HeadImportance


def test_head_importance_against_numpy():
    values = 1e6 + torch.randn(40, 2, 3)  # a spread that a sum of squares in float32 would lose
    metric = HeadImportance(2, 3)
    for part in values.split([1, 7, 32]):
        metric.update(part)
    found = metric.compute()
    expected = values.double().numpy()
    np.testing.assert_allclose(found["mean"], expected.mean(0), rtol=1e-6)
    np.testing.assert_allclose(found["std"], expected.std(0, ddof=1), rtol=0.05)
    np.testing.assert_allclose(
        found["share"], expected.mean(0) / expected.mean(0).sum(-1, keepdims=True), rtol=1e-5
    )


def test_head_importance_with_ragged_layers_and_failed_images():
    values = torch.rand(5, 2, 3)
    values[:, 1, 2] = torch.nan  # layer 1 has two heads
    values[3] = torch.nan  # image 3 could not be explained
    metric = HeadImportance(2, 3)
    metric.update(values[:2])
    metric.update(values[2:])
    found = metric.compute()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mean, std = np.nanmean(values.numpy(), 0), np.nanstd(values.numpy(), 0, ddof=1)
    np.testing.assert_allclose(found["mean"], mean, rtol=1e-5)
    np.testing.assert_allclose(found["std"], std, rtol=1e-4)
    np.testing.assert_allclose(found["share"], mean / np.nansum(mean, -1, keepdims=True), rtol=1e-5)


def test_head_importance_without_images_and_of_a_wrong_shape():
    metric = HeadImportance(2, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchmetrics' own word about compute before update
        assert all(value.isnan().all() for value in metric.compute().values())
    with pytest.raises(ValueError, match="2 layers and 3 heads, got \\(4, 3, 2\\)"):
        metric.update(torch.rand(4, 3, 2))


def test_head_importance_takes_what_gmar_returns(model, batch):
    result = gmar(model, batch[0])
    metric = HeadImportance(*result.importance.shape[1:])
    assert metric(result.importance)["mean"].shape == (2, 3)
    torch.testing.assert_close(metric.compute()["mean"], result.importance.mean(0))


# --- two processes


def _process(rank, folder, images, heatmaps, targets, importance):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.set_num_threads(1)
    rows = slice(0, 4) if rank == 0 else slice(4, 6)  # as unequal as a last batch may be
    model = small_vit()
    metrics = [InsertionAUC(model, steps=2), SaCo(model, groups=3), PointingGame()]
    for metric in metrics[:2]:
        metric.update(images[rows], heatmaps[rows], targets[rows])
    metrics[2].update(heatmaps[rows], images[rows].mean(1) > 0)
    heads = HeadImportance(2, 3)
    for part in importance[rows].split(1):
        heads.update(part)
    found = [metric.compute() for metric in metrics], heads.compute()
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.distributed
def test_two_processes_agree_with_one(tmp_path, batch):
    images, heatmaps, targets = batch
    heatmaps = heatmaps.clone()
    heatmaps[5] = torch.nan
    importance = torch.rand(6, 2, 3)
    arguments = (str(tmp_path), images, heatmaps, targets, importance)
    mp.start_processes(_process, arguments, nprocs=2, start_method="fork")
    model = small_vit()
    expected = [
        faithfulness.insertion(model, images, heatmaps, targets, steps=2).nanmean(),
        faithfulness.saco(model, images, heatmaps, targets, groups=3).nanmean(),
        localisation.pointing_game(heatmaps, images.mean(1) > 0).nanmean(),
    ]
    for rank in (0, 1):
        found, heads = torch.load(tmp_path / f"{rank}.pt")
        assert nn.functional.l1_loss(torch.stack(found), torch.stack(expected)) < 1e-6
        torch.testing.assert_close(heads["mean"], importance.mean(0))
        torch.testing.assert_close(heads["std"], importance.std(0))


MODEL_METRICS = (InsertionAUC, DeletionAUC, AverageDrop, AverageIncrease, SaCo)


@pytest.mark.parametrize("kind", [*MODEL_METRICS, PointingGame, EnergyInMask, HeadImportance])
def test_torchmetrics_own_arguments_reach_it(kind):
    own = {
        "sync_on_compute": False,
        "dist_sync_on_step": True,
        "compute_on_cpu": True,
        "compute_with_cache": False,
    }
    arguments = (
        (torch.nn.Linear(2, 2),) if kind in MODEL_METRICS else (2, 3) if kind is HeadImportance else ()
    )
    metric = kind(*arguments, **own)
    assert {name: getattr(metric, name) for name in own} == own
    with pytest.raises(ValueError, match="nonsense"):
        kind(*arguments, nonsense=1)
