from dataclasses import asdict

import numpy as np
import pytest
import torch

from gmar_lightning.show.colour import HEAT, heat_table
from gmar_lightning.show.grids import evolution_raster, importance_grid, short_names
from gmar_lightning.show.render import contact_sheet, overlay, to_uint8_image
from tests.helpers.synthetic_history import collapse_event, photographs

rng = np.random.default_rng(2)


def cielab(rgb: np.ndarray) -> np.ndarray:
    """sRGB uint8 to CIELAB, from the CIE's own formulas: a second opinion on a table built in OKLab."""
    values = rgb / 255.0
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    to_xyz = [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.072175],
        [0.0193339, 0.119192, 0.9503041],
    ]
    ratio = linear @ np.array(to_xyz).T / np.array([0.95047, 1.0, 1.08883])
    f = np.where(ratio > (6 / 29) ** 3, np.cbrt(ratio), ratio / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1)


def test_colours_rise_in_lightness_in_even_steps():
    lightness = cielab(heat_table(33))[:, 0]
    assert (np.diff(lightness) > 0).all()
    assert lightness[0] < 15
    assert lightness[-1] > 90
    steps = np.linalg.norm(np.diff(cielab(heat_table(17)), axis=0), axis=1)
    assert steps.max() / steps.min() < 2.5
    assert HEAT.shape == (256, 3)
    assert HEAT.dtype == np.uint8


@pytest.mark.parametrize("lost", [0, 1], ids=["red-blind", "green-blind"])
def test_colours_keep_their_order_for_the_colour_blind(lost):
    # Viénot, Brettel and Mollon 1999: a dichromat's view, in linear light
    matrix = {
        0: [[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]],
        1: [[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]],
    }[lost]
    values = heat_table(17) / 255.0
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    seen = np.clip(linear @ np.array(matrix).T, 0, 1)
    seen = np.where(seen <= 0.0031308, 12.92 * seen, 1.055 * seen ** (1 / 2.4) - 0.055)
    assert (np.diff(cielab(seen * 255)[:, 0]) > 0).all()


@pytest.mark.parametrize("size", [(60, 90), (90, 60)])
def test_overlay_puts_the_heat_where_the_map_has_it(size):
    height, width = size
    grid_h, grid_w = height // 15, width // 15
    photo = np.full((height, width, 3), 128, np.uint8)
    heatmap = np.zeros((grid_h, grid_w))
    heatmap[1, grid_w - 1] = 5.0
    picture = overlay(photo, heatmap)
    assert picture.shape == photo.shape
    assert picture.dtype == np.uint8
    change = np.abs(picture.astype(int) - overlay(photo, 0 * heatmap)).sum(axis=2)
    y, x = np.unravel_index(change.argmax(), change.shape)
    assert (y // 15, x // 15) == (1, grid_w - 1)
    assert change[-1, 0] <= 3


def test_overlay_scales_each_map_by_itself():
    photo = photographs(1)[0]
    heatmap = rng.random((4, 4))
    np.testing.assert_allclose(
        overlay(photo, heatmap).astype(int), overlay(photo, 1e-6 * heatmap + 1e-7), atol=2
    )


def test_overlay_of_a_constant_map_invents_nothing():
    photo = photographs(1)[0]
    constant = np.full((4, 4), 0.25, np.float32)
    noisy = constant * (1 + 1e-7 * rng.standard_normal((4, 4)))
    np.testing.assert_array_equal(overlay(photo, constant), overlay(photo, 0 * constant))
    np.testing.assert_array_equal(overlay(photo, noisy), overlay(photo, constant))
    assert (np.ptp(overlay(photo, constant).astype(int), axis=2) <= 1).all()  # grey: no colour at all


def test_overlay_leaves_the_photograph_readable():
    photo = photographs(1, 128)[0]
    picture = overlay(photo, rng.random((8, 8)))
    grey = photo.mean(axis=2).ravel()
    flat = overlay(np.full_like(photo, 128), rng.random((8, 8))).mean(axis=2).ravel()
    assert np.corrcoef(picture.mean(axis=2).ravel(), grey)[0, 1] > 0.4
    assert abs(np.corrcoef(flat, grey)[0, 1]) < 0.4


def test_overlay_marks_what_is_not_finite():
    photo = photographs(1)[0]
    heatmap = rng.random((4, 4))
    broken = heatmap.copy()
    broken[3, 3] = np.nan
    picture = overlay(photo, broken).astype(int)
    corner = picture[52:, 52:].reshape(-1, 3)
    assert {(196, 70, 140)} <= set(map(tuple, corner))
    assert (196, 70, 140) not in set(map(tuple, picture[:40, :40].reshape(-1, 3)))
    everything = overlay(photo, np.full((4, 4), np.nan))
    assert (everything.reshape(-1, 3) == (196, 70, 140)).all(axis=1).mean() > 0.3
    assert overlay(photo, np.full((4, 4), np.inf)).mean() > 60


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_denormalising_gives_the_photograph_back(dtype):
    photo = photographs(1)[0]
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    normalised = (torch.from_numpy(photo).permute(2, 0, 1) / 255 - torch.tensor(mean)[:, None, None]) / (
        torch.tensor(std)[:, None, None]
    )
    back = to_uint8_image(normalised.to(dtype), mean, std)
    np.testing.assert_allclose(back.astype(int), photo, atol=0 if dtype is torch.float32 else 2)


@pytest.mark.parametrize("shape", [(1, 6, 8), (6, 8, 1), (6, 8), (3, 6, 8), (6, 8, 3), (4, 6, 8)])
def test_every_layout_becomes_rgb(shape):
    image = to_uint8_image(np.full(shape, 0.5, np.float32))
    assert image.shape == (6, 8, 3)
    assert np.unique(image).tolist() == [128]


def test_unnormalised_and_broken_values_are_never_black():
    image = rng.normal(0, 1, (3, 8, 8)).astype(np.float32)
    shown = to_uint8_image(image)
    assert shown.min() == 0
    assert shown.max() == 255
    assert np.unique(to_uint8_image(np.full((3, 4, 4), np.nan, np.float32))).tolist() == [127]
    photo = photographs(1)[0]
    np.testing.assert_array_equal(to_uint8_image(photo), photo)
    with pytest.raises(ValueError, match="shape"):
        to_uint8_image(np.zeros((2, 3, 4, 4)))


def cell_colours(picture: np.ndarray) -> set[tuple[int, ...]]:
    return set(map(tuple, picture.reshape(-1, 3)))


def test_grid_colours_mean_the_same_in_every_picture():
    shares = np.array([[0.25, 0.25, 0.25, 0.25], [0.7, 0.1, 0.1, 0.1]])
    fair = tuple(int(c) for c in HEAT[85])  # a fair share is a third of the scale
    assert fair in cell_colours(importance_grid(shares))
    assert fair in cell_colours(importance_grid(shares[:1]))


def test_grid_crosses_the_flagged_cells_only():
    shares = rng.dirichlet(np.ones(6), size=4)
    plain, crossed = importance_grid(shares), importance_grid(shares, [(2, 3)])
    ys, xs = np.nonzero((plain != crossed).any(axis=2))
    assert 0 < np.ptp(ys) < 30
    assert 0 < np.ptp(xs) < 30


def test_grid_greys_out_heads_that_do_not_exist():
    ragged = np.array([[0.5, 0.5, np.nan, np.nan], [0.25, 0.25, 0.25, 0.25]])
    colours = cell_colours(importance_grid(ragged))
    assert (214, 217, 222) in colours
    # two heads of two are both fair: NaN does not count as a head
    assert tuple(int(c) for c in HEAT[85]) in cell_colours(importance_grid(ragged[:1]))
    assert importance_grid(np.full((2, 3), np.nan)).dtype == np.uint8


def test_evolution_shows_a_collapse_as_a_dark_streak_on_its_row():
    shares = np.full((40, 2, 4), 0.25)
    shares[20:, 1, 2] = 0.001
    alive = evolution_raster(np.full((40, 2, 4), 0.25), np.arange(40))
    dying = evolution_raster(shares, np.arange(40))
    ys, xs = np.nonzero((alive != dying).any(axis=2))
    assert np.ptp(ys) + 1 <= 12
    # the last half of the 40 columns, each 18 wide
    assert np.ptp(xs) + 1 == 20 * 18
    assert dying[ys, xs].mean() < 40


@pytest.mark.parametrize("probes", [1, 2, 100, 1000, 5000])
def test_evolution_stays_small_for_large_models_and_long_runs(probes):
    shares = np.full((probes, 24, 16), 1 / 16)
    picture = evolution_raster(shares, np.arange(probes) * 100, [asdict(collapse_event(0, 23, 15))])
    assert picture.shape[0] < 1100
    assert picture.shape[1] < 1200


def test_evolution_leaves_a_grey_gap_for_a_failed_probe():
    shares = np.full((10, 1, 4), 0.25)
    shares[4] = np.nan
    assert (214, 217, 222) in cell_colours(evolution_raster(shares, np.arange(10)))
    assert evolution_raster(np.empty((0, 2, 3)), []).dtype == np.uint8


def test_names_are_cut_to_what_tells_them_apart():
    assert short_names([f"blocks.{n}.attn" for n in range(11)]) == [str(n) for n in range(11)]
    torchvision = [f"encoder.layers.encoder_layer_{n}.self_attention" for n in range(3)]
    assert short_names(torchvision) == ["0", "1", "2"]
    assert short_names(["layers.0.blocks.1.attn", "layers.1.blocks.0.attn"]) == ["0.blocks.1", "1.blocks.0"]
    assert short_names(["attn"]) == ["attn"]


def test_contact_sheet_holds_every_image():
    images = [np.full((10, 12, 3), 20 * n, np.uint8) for n in range(1, 6)]
    sheet = contact_sheet(images, columns=3, gap=2)
    assert sheet.shape == (22, 40, 3)
    assert {20, 40, 60, 80, 100} <= set(np.unique(sheet))
