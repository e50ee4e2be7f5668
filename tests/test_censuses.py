"""Whole collections of models: transformers' image classifiers, and vision transformers written by hand."""

import pytest
import torch

from gmar_lightning import gmar
from tests.benchmarks.census import HEADS_ONLY, STAGE, WHOLE
from tests.benchmarks.census_transformers import census
from tests.helpers.handwritten import HANDWRITTEN
from tests.helpers.materialised import heads_alone, maps_of_one, stage_row
from tests.helpers.networks import pictures, seeded
from tests.helpers.reference import relative_error


@pytest.mark.parametrize("kind", HANDWRITTEN)
def test_written_by_hand(kind):
    model, images = seeded(HANDWRITTEN[kind]).double(), pictures().double()
    found = gmar(model, images, rollout=("gradient", "paper", "flow"))
    assert found.scope == "whole"
    first = model.front.shape[1]
    for index, image in enumerate(images):
        maps = maps_of_one(model, image[None], found.targets[index])
        importance, contribution = (torch.stack(part) for part in zip(*heads_alone(maps), strict=True))
        assert relative_error(found.importance[index], importance) < 1e-10
        assert relative_error(found.contribution[index], contribution) < 1e-10
        # "flow" divides by the sum of the row that is pulled; by those of the map's rows only where all are alike.
        forms = [form for form in found.maps if form != "flow" or kind != "deepvit"]
        for form in forms:
            shown = found.maps[form]
            row = stage_row(maps, form, read=model.row())[first : first + 16]
            assert relative_error(shown[index].flatten(), row) < 1e-10


@pytest.mark.slow
def test_every_image_classifier_of_transformers():
    verdicts = {row.names[0]: (row.verdict, row.reason) for row in census()}
    assert not [name for name, (verdict, _) in verdicts.items() if verdict in ("wrong", "error")]
    counts = [sum(verdict == kind for verdict, _ in verdicts.values()) for kind in (WHOLE, STAGE, HEADS_ONLY)]
    assert counts[0] >= 12
    assert counts[1] >= 2
    assert counts[2] >= 8
    for name, (verdict, reason) in verdicts.items():
        if verdict == "refused":
            assert any(word in reason for word in ("no attention seen", "by hand", "expected logits")), name
