import numpy as np
import pytest

from gmar_lightning.show.outline import outlined


def test_the_border_lies_inside_the_region_and_nothing_else_changes():
    image = np.full((96, 96, 3), 100, np.uint8)
    mask = np.zeros((12, 12), bool)
    mask[3:6, 6:12] = True
    found = outlined(image, mask)
    changed = (found != image).any(-1)
    region = np.kron(mask, np.ones((8, 8), bool))
    assert not changed[~region].any()
    # three lines of one pixel: dark, white, dark; the inside of the region stays as it was
    assert (found[24, 48:96] == (16, 20, 28)).all()
    assert (found[25, 49:95] == (255, 255, 255)).all()
    assert not changed[27:45, 51:93].any()


@pytest.mark.parametrize("value", [True, False])
def test_a_region_without_border_draws_nothing(value):
    image = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    assert (outlined(image, np.full((4, 6), value)) == image).all()


def test_pixel_masks_of_any_shape_fit_any_picture():
    image = np.zeros((50, 70, 3), np.uint8)
    y, x = np.mgrid[:33, :47]
    found = outlined(image, (y - 16) ** 2 + (x - 20) ** 2 < 100)
    assert found.shape == image.shape
    assert (found == 255).any()
    assert not (image == 255).any()
