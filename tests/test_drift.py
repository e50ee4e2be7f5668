import numpy as np
import pytest
from scipy.stats import spearmanr

from gmar_lightning.monitor.drift import rank_correlation, top_overlap

rng = np.random.default_rng(3)


@pytest.mark.parametrize("levels", [None, 5], ids=["distinct", "tied"])
def test_rank_correlation_equals_scipy(levels):
    a, b = rng.random((6, 7, 5)), rng.random((6, 7, 5))
    b = 0.6 * a + 0.4 * b
    if levels:
        a, b = np.floor(a * levels), np.floor(b * levels)
    expected = [spearmanr(x.ravel(), y.ravel()).statistic for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(rank_correlation(a, b), expected, atol=1e-12)


def test_rank_correlation_ignores_monotone_change_and_sees_reversal():
    maps = rng.random((3, 4, 4))
    np.testing.assert_allclose(rank_correlation(maps, np.exp(7 * maps)), 1.0)
    np.testing.assert_allclose(rank_correlation(maps, -maps), -1.0)


def test_top_overlap_counts_common_patches():
    a = np.arange(100.0).reshape(1, 10, 10)
    b = a.copy()
    b[0, 9, :5] = -1  # 5 of the 20 hottest leave, 5 colder ones take their places
    assert top_overlap(a, b)[0] == pytest.approx(15 / 20)
    assert top_overlap(a, b, fraction=0.05)[0] == 1.0
    assert top_overlap(a, -a)[0] == 0.0


def test_top_overlap_by_chance_is_the_fraction():
    a, b = rng.random((400, 10, 10)), rng.random((400, 10, 10))
    assert top_overlap(a, b, fraction=0.2).mean() == pytest.approx(0.2, abs=0.02)


def test_top_overlap_does_not_depend_on_the_order_of_tied_patches():
    a = np.floor(rng.random((5, 6, 6)) * 3)
    b = np.floor(rng.random((5, 6, 6)) * 3)
    flipped = top_overlap(a[:, ::-1, ::-1], b[:, ::-1, ::-1])
    np.testing.assert_allclose(top_overlap(a, b), flipped)
    np.testing.assert_allclose(top_overlap(a, a), 1.0)


@pytest.mark.parametrize("measure", [rank_correlation, top_overlap])
def test_a_map_without_order_gives_nan_and_leaves_the_others_alone(measure):
    a = rng.random((4, 3, 3))
    b = a.copy()
    b[1] = 0.5
    b[2, 0, 0] = np.nan
    result = measure(a, b)
    np.testing.assert_array_equal(np.isnan(result), [False, True, True, False])
    assert result[0] == pytest.approx(1.0)


def test_wrong_arguments():
    maps = rng.random((2, 3, 3))
    with pytest.raises(ValueError, match="one shape"):
        rank_correlation(maps, maps[:, :2])
    with pytest.raises(ValueError, match="fraction"):
        top_overlap(maps, maps, fraction=0)
