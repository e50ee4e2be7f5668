"""What results and records show in a notebook: pictures inside the page, nothing fetched, nothing unescaped."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from gmar_lightning import History, gmar
from gmar_lightning.explain.notebook import _STOPS, figure, heat, png
from gmar_lightning.show.colour import HEAT
from tests.helpers.networks import ViT, pictures, seeded
from tests.helpers.synthetic_history import make_history


def images_in(page):
    found = re.findall(r'src="data:image/(png|jpeg);base64,([^"]+)"', page)
    return [Image.open(io.BytesIO(base64.b64decode(data))) for _, data in found]


def test_a_result_shows_its_maps_and_heads():
    result = gmar(seeded(ViT), pictures())
    page = result._repr_html_()
    *maps, heads = images_in(page)
    assert len(maps) == len(result.heatmaps)
    for shown, grid in zip(maps, result.heatmaps.numpy(), strict=True):
        pixels = np.asarray(shown).astype(int).sum(-1)
        assert pixels.shape == grid.shape
        assert pixels.argmax() == grid.argmax()
        assert pixels.argmin() == grid.argmin()
    assert heads.size == result.head_weights.shape[:0:-1]  # a column per head, a row per layer
    assert f"class {int(result.targets[1])}" in page
    assert "http" not in page


def test_the_colours_are_those_of_all_pictures():
    np.testing.assert_array_equal(_STOPS.astype(np.uint8), HEAT[::17])


@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (14, 14)])
def test_the_file_is_a_png_that_another_decoder_reads_back(shape):
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png(pixels)))), pixels)


def test_constant_and_broken_grids():
    assert (heat(np.full((2, 2), 3.0)) == HEAT[0]).all()
    broken = heat(np.array([[0.0, np.nan], [1.0, np.inf]]))
    assert (broken[0, 1] == 128).all()
    assert (broken[1, 1] == 128).all()
    assert (broken[0, 0] == HEAT[0]).all()
    assert (broken[1, 0] == HEAT[255]).all()


def test_captions_cannot_become_markup():
    assert "<script" not in figure(png(np.zeros((1, 1, 3), np.uint8)), '<script>alert(1)</script>"', 10)


def test_a_record_shows_its_last_pictures_and_every_head(tmp_path):
    history = make_history(tmp_path, probes=5, layers=3, heads=4, images=2)
    page = History.load(tmp_path)._repr_html_()
    *photographs, heads = images_in(page)
    assert len(photographs) == 2
    assert heads.size == (5, 12)  # a column per probe, a row per head
    assert str(history.steps[-1]) in page
