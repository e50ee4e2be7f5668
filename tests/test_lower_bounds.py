"""The oldest versions that `pyproject.toml` allows, installed into an environment of their own, do the main job."""

import os
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# What reaches deepest into torch, Lightning and timm; the other tests need packages without a lower bound here.
TESTS = ("tests/test_gmar.py", "tests/test_attention.py", "tests/test_callback.py")


def oldest(requirements):
    """`torch>=2.6` as `torch==2.6`."""
    return [requirement.replace(">=", "==") for requirement in requirements]


def test_every_dependency_has_a_lower_bound():
    requirements = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["train"]
    assert all(requirement.count(">=") == 1 and "," not in requirement for requirement in requirements)


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    if sys.version_info >= (3, 14):
        pytest.skip("torch 2.6 has no wheels for this Python")
    folder = tmp_path_factory.mktemp("oldest")
    venv.create(folder, with_pip=True)
    binary = folder / "bin" / "python"
    train = PROJECT["optional-dependencies"]["train"]
    wanted = [*oldest(PROJECT["dependencies"]), *oldest(train), "pytest==8.4"]
    command = [binary, "-m", "pip", "install", "-q", *wanted]
    installed = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    if installed.returncode:
        # Offline machines cannot; a bound that does not exist must not hide behind that.
        assert "No matching distribution" not in installed.stderr or "ConnectionError" in installed.stderr, (
            installed.stderr[-500:]
        )
        pytest.skip(f"the oldest versions cannot be installed here: {installed.stderr[-300:]}")
    return binary


def run(python, folder, *arguments):
    environment = {**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [python, *map(str, arguments)],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=900, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout + done.stderr


@pytest.mark.slow
def test_the_oldest_versions_pass_the_core_tests(python):
    assert "passed" in run(python, ROOT, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS)


@pytest.mark.slow
def test_the_oldest_versions_train(python, tmp_path):
    config = ROOT / "configs" / "digits.yaml"
    run(python, tmp_path, ROOT / "train.py", "fit", "--config", config, "--trainer.max_epochs", 1)
    record = tmp_path / "runs" / "digits" / "version_0" / "gmar"
    assert (record / "report.html").is_file()
    assert len((record / "history.jsonl").read_text().splitlines()) == 2
