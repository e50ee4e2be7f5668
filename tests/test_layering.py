"""What imports what: the engine stands on torch alone, and rooms import downwards only."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "gmar_lightning"
# A room may import from itself and from what stands below it.
BELOW = {"version": -1, "targets": -1, "explain": 0, "metrics": 1, "monitor": 1, "show": 2}
TOP = 3  # the callback and the files beside it


def imports(path):
    """Absolute dotted names of everything a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield f"{node.module}.{node.names[0].name}" if node.module == "gmar_lightning" else node.module


def room_of(module):
    parts = module.split(".")
    inside = parts[0] == "gmar_lightning" and len(parts) > 1 and not parts[1].startswith("__")
    return parts[1] if inside else None


def test_rooms_import_downwards_only():
    seen = 0
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if room in ("__init__", "__main__", "training"):
            continue
        for module in imports(path):
            other = room_of(module)
            if other is None:
                continue
            seen += 1
            own, height = BELOW.get(room, TOP), BELOW.get(other, TOP)
            assert other == room or height < own or height == own == TOP, f"{path} imports {module}"
    assert seen > 20


def test_nothing_but_the_command_line_imports_the_training_room():
    for path in PACKAGE.rglob("*.py"):
        if path.relative_to(PACKAGE).parts[0] in ("training", "__main__.py"):
            continue
        assert not [m for m in imports(path) if room_of(m) == "training"], path


def test_engine_imports_torch_alone():
    allowed = {"torch", "numpy", "gmar_lightning", *sys.stdlib_module_names}
    for path in (PACKAGE / "explain").rglob("*.py"):
        foreign = {module.split(".")[0] for module in imports(path)} - allowed
        assert not foreign, f"{path} imports {foreign}"


def test_engine_runs_without_trainer_logger_or_model_library():
    code = """
import sys
BLOCKED = {"lightning", "lightning_fabric", "pytorch_lightning", "wandb", "timm", "transformers", "torchvision",
           "torchmetrics", "jsonargparse"}
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"blocked: {name}")
sys.meta_path.insert(0, Blocker())
import torch
import gmar_lightning.explain.gmar
from gmar_lightning import gmar
from tests.helpers.networks import ViT, pictures, seeded
result = gmar(seeded(ViT), pictures(), signals=True)
assert result.heatmaps.shape == (2, 4, 4)
assert not BLOCKED & {name.split(".")[0] for name in sys.modules}
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
