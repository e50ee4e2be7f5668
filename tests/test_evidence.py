"""What the record says of its own pictures: heat that sticks to one spot, faithfulness in words."""

from dataclasses import replace

import numpy as np
import pytest

from gmar_lightning.monitor.history import History
from gmar_lightning.show.evidence import evidence_lines, fixed_region
from gmar_lightning.show.verdict import judge
from tests.helpers.synthetic_history import make_history

rng = np.random.default_rng(4)


def run_with(folder, maps: np.ndarray, **changes) -> History:
    """A healthy run whose last probe has these maps `(images, grid_h, grid_w)`."""
    history = make_history(folder, loss_at=lambda progress: 2.3 - 2.0 * progress, grid=maps.shape[1:])
    last = history.records[-1]
    added = replace(
        last, step=last.step + 50, global_step=last.global_step + 50, maps={"gradient": maps}, **changes
    )
    history.append(added)
    return History.load(folder)


def spot(images: int, grid: tuple[int, int], share: float, row: int = 0, column: int = 0) -> np.ndarray:
    """Heat anywhere, and a given part of it in one patch."""
    maps = rng.random((images, *grid))
    maps[:, row, column] = 0
    maps *= (1 - share) / maps.sum((1, 2), keepdims=True)
    maps[:, row, column] = share
    return maps


def moving(images: int, grid: tuple[int, int], share: float) -> np.ndarray:
    """The same, in another patch of every image."""
    return np.stack([spot(1, grid, share, k * 5 % grid[0], k * 3 % grid[1])[0] for k in range(images)])


def test_the_figures_are_those_of_the_maps(tmp_path):
    maps = spot(16, (8, 8), 0.7, row=7, column=2)
    region = fixed_region(run_with(tmp_path, maps))
    assert region is not None
    assert region.patches[0] == (7, 2)
    assert len(region.patches) == 3
    part = maps / maps.sum((1, 2), keepdims=True)
    inside = sum(part[:, row, column] for row, column in region.patches)
    assert region.share == pytest.approx(np.median(inside), abs=0.01)
    assert region.least == pytest.approx(np.quantile(inside, 0.1), abs=0.01)
    assert region.first < 0.2
    assert "row 8, column 3" in region.text


@pytest.mark.parametrize("grid", [(8, 8), (14, 14), (6, 9)])
@pytest.mark.parametrize("share", [0.55, 0.8])
def test_heat_in_one_spot_of_every_image_is_named(tmp_path, grid, share):
    row, column = grid[0] - 1, 1
    verdict = judge(run_with(tmp_path, spot(12, grid, share, row, column)))
    finding = next(f for f in verdict.findings if f.kind == "shortcut")
    assert f"row {row + 1}, column {column + 1}" in finding.text
    assert verdict.headline == "shortcut-like evidence"
    # a person has to look whether the spot belongs to the object: no alarm
    assert verdict.healthy


@pytest.mark.parametrize(
    "maps",
    [
        pytest.param(moving(16, (8, 8), 0.8), id="a hot patch elsewhere in every image"),
        pytest.param(spot(16, (8, 8), 0.3), id="a mild spot"),
        pytest.param(rng.random((16, 8, 8)), id="heat everywhere"),
        pytest.param(spot(16, (4, 4), 0.8), id="a grid so coarse that an object fills a patch"),
        pytest.param(spot(4, (8, 8), 0.8), id="too few images"),
        pytest.param(
            np.concatenate([spot(11, (8, 8), 0.9), moving(5, (8, 8), 0.9)]),
            id="a third of the images without",
        ),
        pytest.param(np.zeros((16, 8, 8)), id="no heat"),
    ],
)
def test_what_is_no_shortcut_is_not_called_one(tmp_path, maps):
    assert not judge(run_with(tmp_path, maps)).has("shortcut")


def test_faithfulness_is_told_with_its_figures(tmp_path):
    numbers = {
        "insertion_minus_deletion": 0.31,
        "insertion_minus_deletion_random": 0.02,
        "insertion_minus_deletion_rollout": 0.2,
        "class_sensitivity": 0.43,
        "randomisation": 0.12,
    }
    history = make_history(tmp_path / "good", faithfulness=numbers)
    text = " ".join(evidence_lines(history))
    for figure in ("0.31", "random map 0.02", "plain rollout 0.20", "sensitivity 0.43", "Randomisation 0.12"):
        assert figure in text
    assert "do not rely" not in text
    poor = {**numbers, "insertion_minus_deletion": 0.03, "class_sensitivity": 0.97}
    text = " ".join(evidence_lines(make_history(tmp_path / "poor", faithfulness=poor)))
    assert "do not rely" in text
    assert "hardly depend on the class" in text
    untested = make_history(tmp_path / "untested", faithfulness=dict.fromkeys(numbers, float("nan")))
    assert "Insertion" not in " ".join(evidence_lines(untested))
