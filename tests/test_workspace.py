"""The saved W&B view, serialised without a login."""

import json
import subprocess
import sys

import pytest

from gmar_lightning.show import workspace


def test_view_shows_the_keys_that_are_logged():
    pytest.importorskip("wandb_workspaces")
    model = json.loads(workspace.layout("someone", "project")._to_model().model_dump_json(by_alias=True))
    text = json.dumps(model)
    for key in (
        "gmar/collapsed_heads",
        "gmar/head_evolution",
        "gmar/heatmaps",
        "gmar_layers/",
        "gmar_heads/",
    ):
        assert key in text, key
    assert "trainer/global_step" in text


def test_importing_the_module_does_not_import_the_extra():
    code = "import sys, gmar_lightning.show.workspace; print(any(m.startswith('wandb') for m in sys.modules))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == "False"


def test_without_the_extra_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    with pytest.raises(ImportError, match=r"gmar-lightning\[workspace\]"):
        workspace.create("someone", "project")
