"""What importing the package brings along: nothing that is not needed, counted in modules and not in seconds."""

from __future__ import annotations

import subprocess
import sys

# Own modules that the callback needs. At about 1 ms each (0.06 to 0.1 s of CPU time in all, with compiled bytecode)
# this keeps it well under 0.15 s on top of Lightning's own import.
MOST_OWN = 115


SCRIPT = """
import sys, numpy, PIL.Image
import gmar_lightning
print(*sys.modules)
import lightning.pytorch
before = set(sys.modules)
from gmar_lightning import GMARCallback
print(*set(sys.modules) - before)
"""


def test_the_callback_brings_nothing_but_itself_and_the_package_alone_no_lightning() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, timeout=300
    )
    alone, added = (set(line.split()) for line in done.stdout.splitlines()[-2:])
    assert "gmar_lightning.explain.gmar" in alone
    assert not {"lightning", "pytorch_lightning", "wandb", "timm", "torchmetrics", "transformers"} & alone
    assert not {"torchvision", "matplotlib", "pandas", "scipy", "sklearn", "tensorboard"} & alone
    own = {name for name in alone | added if name.split(".")[0] == "gmar_lightning"}
    assert "gmar_lightning.callback" in own
    assert not any(name.startswith("gmar_lightning.training") for name in own)
    assert len(own) <= MOST_OWN
    known = {*sys.stdlib_module_names, "gmar_lightning", "torch", "numpy", "PIL"}
    assert not {name for name in added if name.split(".")[0] not in known}
