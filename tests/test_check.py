"""`check` and `gmar doctor`: the verdict of a model that is explained, and of one that is not."""

import json

import pytest
from torch import nn

from gmar_lightning import UnsupportedModelError, check, gmar
from gmar_lightning.__main__ import main
from tests.helpers.networks import DIM, ViT, pictures, seeded
from tests.helpers.tiny import Classifier, fit, loaders, vit, watcher


class Mean(ViT):
    def forward(self, images):
        return self.head(self.features(images)[:, 1:].mean(1))


def test_verdict_of_a_model_that_is_explained():
    verdict = check(seeded(ViT), pictures())
    assert (verdict.supported, verdict.reason, verdict.grid, verdict.prefix) == (True, "", (4, 4), 1)
    assert verdict.layers == ("blocks.0.attn", "blocks.1.attn", "blocks.2.attn")
    assert (verdict.heads, verdict.readout) == ((3, 3, 3), "token 0")
    assert verdict.shown == "one of 5 class scores; picture: whole"
    assert "4 x 4 patches after 1 other tokens" in str(verdict)
    assert check(seeded(Mean), pictures()).readout == "mean of 16 tokens, 1 to 16"


def test_verdict_of_features():
    verdict = check(vit(num_classes=0), pictures(2, 16, 16))
    assert not verdict.supported
    assert "features instead of class scores" in str(verdict)


class Two(ViT):
    def forward(self, image, text):
        return super().forward(image)


class Keywords(ViT):
    def forward(self, **batch):
        return super().forward(batch["image"])


@pytest.mark.parametrize(
    ("model", "module", "said"),
    [(Two, None, "missing 1 required"), (Keywords, None, "TypeError"), (ViT, "head", "mat1 and mat2")],
)
def test_a_forward_that_takes_something_else_is_refused(model, module, said):
    with pytest.raises(UnsupportedModelError, match=rf"images \(2, 3, 32, 32\)\): .*{said}"):
        gmar(seeded(model), pictures(), module=module)


def test_it_is_refused_before_the_first_step(tmp_path):
    class Asks(Classifier):
        def forward(self, images, mask):
            return self.net(images)

        def training_step(self, batch, batch_idx):
            return self.net(batch[0]).sum()

        def validation_step(self, batch, batch_idx):
            return None

    with pytest.raises(UnsupportedModelError, match="failed on what it was given"):
        fit(tmp_path, Asks(), loaders(), callbacks=[watcher(tmp_path, on_error="warn")])


def factory():
    return seeded(ViT)


def headless():
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, DIM))


def test_doctor(capsys):
    here = "tests.test_check"
    assert main(["doctor", f"{here}:factory", "--image-size", "32", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["supported"]
    assert said["grid"] == [4, 4]
    assert 1.5 < said["forwards"] < 4
    assert said["memory_mib"] > 0
    assert main(["doctor", f"{here}:factory", "--image-size", "32"]) == 0
    assert "forwards per image" in capsys.readouterr().out
    assert main(["doctor", f"{here}:headless", "--image-size", "32"]) == 1
    assert "not supported: no attention seen" in capsys.readouterr().out
    assert main(["doctor", "no_such_model"]) == 2
