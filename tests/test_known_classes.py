"""Whether a run's scores are those of its classes, and what is said of them: in the console, the record, captions."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

from gmar_lightning import GMARCallback, UnsupportedModelError, gmar
from gmar_lightning.arguments import ConfigurationError
from gmar_lightning.explain.ablation import ablate_heads
from gmar_lightning.explain.faithfulness import deletion
from gmar_lightning.monitor.history import History
from gmar_lightning.monitor.probe import ProbeBatch
from gmar_lightning.monitor.probing import Moment, Prober
from gmar_lightning.monitor.settings import KnownClasses, ProbeSettings
from gmar_lightning.show.dashboard import captions, image_rows
from gmar_lightning.show.report_data import fitted_run
from tests.helpers.tiny import CLASSES, Classifier, fit, images_of, loaders, vit, watcher

PROBE = ProbeBatch(images_of(4), torch.tensor([0, 1, 2, 0]))  # the last of the four classes is not among them
WIDTH = 12


class Apart(LightningModule):
    """A backbone that ends in a projection, and a head beside it, put together in the steps or in `forward`."""

    def __init__(self, head=CLASSES, forward=False, metric=None):
        super().__init__()
        self.backbone = vit(num_classes=WIDTH)
        if head:
            self.head = nn.Linear(WIDTH, head)
        if metric:
            self.accuracy = MulticlassAccuracy(metric)
        if forward:
            self.forward = lambda images: self.head(self.backbone(images))


NOTHING = KnownClasses()


def taken(model, known=NOTHING, probe=PROBE, **settings):
    prober = Prober(ProbeSettings(known=known, **settings), on_error="raise")
    prober.begin(probe)
    return prober.take(model, Moment(0, 0))


def test_what_goes_on_from_the_explained_numbers_is_the_classifier():
    with pytest.raises(
        UnsupportedModelError, match=r"'backbone' returns 12 numbers .* head.weight goes on .* to 4"
    ):
        taken(Apart(), module="backbone")
    with pytest.raises(UnsupportedModelError, match="Apart goes on to 4"):
        taken(Apart(forward=True), module="backbone")
    assert taken(Apart(forward=True)).classes == "classes=4?"
    # the same head behind features that forward returns, used in the training step alone
    features = Apart()
    features.forward = lambda images: features.backbone(images)
    with pytest.raises(
        UnsupportedModelError, match=r"the forward pass returns 12 numbers .* head.weight goes on"
    ):
        taken(features)


def test_fewer_numbers_than_the_metric_has_classes():
    known = KnownClasses({"accuracy": 100}, frozenset({"accuracy"}))
    with pytest.raises(
        UnsupportedModelError, match="returns 12 numbers for each image, and accuracy has 100"
    ):
        taken(Apart(head=0), known, module="backbone")


@pytest.mark.parametrize(
    ("known", "labels", "said"),
    [
        (KnownClasses(), [0, 1, 2, 0], "classes=4?"),
        (KnownClasses(), [0, 1, 2, 3], "classes=4"),
        (KnownClasses({"class_names": 4}), [0, 1, 2, 0], "classes=4"),
        (KnownClasses({"class_names": 3, "accuracy": 4}, frozenset({"accuracy"})), [0, 1, 2, 0], "classes=4"),
        # a head for more classes than the data set has is no features
        (KnownClasses({"class_names": 3}), [0, 1, 2, 0], "classes=4?"),
    ],
)
def test_healthy_models_are_explained_and_doubt_is_said(known, labels, said):
    assert taken(vit(), known, replace(PROBE, labels=torch.tensor(labels))).classes == said


def test_a_head_beside_others_is_confirmed_by_its_classes():
    """A module that goes on from class scores (a calibration, a second task) does not make them features."""
    model = Apart(head=CLASSES)
    model.backbone, model.more = vit(), nn.Linear(CLASSES, 7)
    assert taken(model, KnownClasses({"class_names": 4}), module="backbone").classes == "classes=4"


class Counted(Classifier):
    """Says how many classes there are, by its metric."""

    def __init__(self, classes=CLASSES, **changes):
        super().__init__(**changes)
        self.accuracy = MulticlassAccuracy(classes)


def test_console_record_and_report_say_what_is_explained(tmp_path, capsys):
    fit(tmp_path, Counted(), loaders(), callbacks=[watcher(tmp_path, verify=False)], max_steps=1)
    assert "GMAR  2 layers of 2 heads, classes=4, maps 2 x 2\n" in capsys.readouterr().out
    folder = tmp_path / "gmar"
    assert json.loads((folder / "run.json").read_text())["explained"] == "classes=4"
    assert fitted_run(History.load(folder), "run", 10**6)["settings"]["explained"] == "classes=4"


def test_features_are_refused_before_the_first_step(tmp_path):
    class Headless(Counted):
        def forward(self, images):
            return self.net.forward_head(self.net.forward_features(images), pre_logits=True)

    module = Headless()
    before = [weight.clone() for weight in module.parameters()]
    with pytest.raises(UnsupportedModelError, match="class scores"):
        fit(tmp_path, module, loaders(), callbacks=[watcher(tmp_path)], num_sanity_val_steps=0)
    assert all(torch.equal(one, two) for one, two in zip(before, module.parameters(), strict=True))


# What is displayed -------------------------------------------------------------------------------------------


class Ends(nn.Module):
    """A ViT whose scores pass a function."""

    def __init__(self, classes, end):
        super().__init__()
        torch.manual_seed(1)
        self.net, self.end = vit(num_classes=classes), end

    def forward(self, images):
        return self.end(4 * self.net(images))


def scores_of(model):
    with torch.no_grad():
        return 4 * model.eval().net(PROBE.images)


SHOWN = {
    "softmaxed": (4, lambda x: x.softmax(-1), None, lambda x: x.softmax(-1)),
    "log-softmaxed": (4, lambda x: x.log_softmax(-1), None, lambda x: x.softmax(-1)),
    "softmaxed in half the precision": (4, lambda x: x.bfloat16().softmax(-1), None, lambda x: x.softmax(-1)),
    "mean of two softmaxes": (
        4,
        lambda x: (x.softmax(-1) + x.softmax(-1)) / 2,
        None,
        lambda x: x.softmax(-1),
    ),
    "sigmoids of labels": (4, lambda x: x.sigmoid(), None, lambda x: x.sigmoid()),
    "labels": (4, lambda x: x, "multilabel", lambda x: x.sigmoid()),
    "logits": (4, lambda x: x, "logits", lambda x: x.softmax(-1)),
    "one logit": (1, lambda x: x, None, lambda x: torch.cat([1 - x.sigmoid(), x.sigmoid()], 1)),
    "one logit, flat": (1, lambda x: x[:, 0], None, lambda x: torch.cat([1 - x.sigmoid(), x.sigmoid()], 1)),
    "one sigmoid": (1, lambda x: x.sigmoid(), None, lambda x: torch.cat([1 - x.sigmoid(), x.sigmoid()], 1)),
    "one sigmoid, flat": (
        1,
        lambda x: x.sigmoid()[:, 0],
        None,
        lambda x: torch.cat([1 - x.sigmoid(), x.sigmoid()], 1),
    ),
}


@pytest.mark.parametrize("kind", SHOWN)
def test_probabilities_are_what_the_output_says(kind):
    classes, end, output, expected = SHOWN[kind]
    model = Ends(classes, end)
    result, chances = gmar(model, PROBE.images, output=output), expected(scores_of(model))
    tolerance = 2e-2 if "half" in kind else 1e-5
    torch.testing.assert_close(result.probabilities, chances, atol=tolerance, rtol=0)
    assert result.targets.tolist() == chances.argmax(-1).tolist()
    record = taken(model, output=output, probe=replace(PROBE, labels=None))
    np.testing.assert_allclose(record.probabilities, chances.amax(-1), atol=tolerance)
    assert list(record.predictions) == chances.argmax(-1).tolist()
    assert f" p={float(chances[0].max()):.2f} " in captions(record, None, None)[0] or "half" in kind


def test_a_single_logit_explains_the_class_it_speaks_for():
    model = Ends(1, lambda x: x - x.mean().detach() * 0)
    logits = scores_of(model)[:, 0]
    for target, sign in ((1, 1), (0, -1)):
        result = gmar(model, PROBE.images, torch.full((4,), target))
        torch.testing.assert_close(result.score, sign * logits)
    chosen = gmar(model, PROBE.images)
    torch.testing.assert_close(chosen.score, logits.abs())
    with pytest.raises(ValueError, match="class 2, but the model has 2"):
        gmar(model, PROBE.images, torch.full((4,), 2))
    # what measures maps and heads speaks of the same two classes
    without = ablate_heads(model, PROBE.images, torch.ones(4, dtype=torch.long), heads=[(0, 0)])
    assert (torch.sign(without.logit_change) == -torch.sign(without.loss_change)).all()
    area = deletion(model, PROBE.images, chosen.heatmaps, torch.ones(4, dtype=torch.long), steps=2)
    other = deletion(model, PROBE.images, chosen.heatmaps, torch.zeros(4, dtype=torch.long), steps=2)
    torch.testing.assert_close(area + other, torch.ones(4))


def test_where_nothing_is_known_the_score_is_shown():
    model = Ends(4, lambda x: x)
    assert gmar(model, PROBE.images).probabilities is None
    record = taken(model, probe=replace(PROBE, labels=None))
    assert np.isnan(record.probabilities).all()
    assert f" score={record.scores[0]:.3g} " in captions(record, None, None)[0]
    assert image_rows(record, None, None)[0]["probability"] is None
    # class indices for labels, and metrics or losses of the run, say what the scores are
    softmax = scores_of(model).softmax(-1).amax(-1)
    np.testing.assert_allclose(taken(model).probabilities, softmax, rtol=1e-5)
    several = taken(model, KnownClasses(output="multilabel"))
    np.testing.assert_allclose(several.probabilities, scores_of(model).sigmoid().amax(-1), rtol=1e-5)


def test_unknown_output():
    with pytest.raises(ValueError, match=r"output='softmax' is unknown; choose one of 'logits', 'prob"):
        gmar(vit(), PROBE.images, output="softmax")
    with pytest.raises(ConfigurationError, match="output='softmax'"):
        GMARCallback(output="softmax")
