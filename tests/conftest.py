"""One thread per process: the tests' tensors are small, and threads that wait for each other cost the time."""

import sys

import pytest
import torch

from tests.helpers.browser import start_chromium

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def chromium(tmp_path_factory):
    """One browser for all tests of the report; skips where there is none."""
    browser = start_chromium(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.quit()


@pytest.fixture(autouse=True)
def _no_wandb_left():
    """A run or a service that one test leaves would be taken up by the next `wandb.init`."""
    yield
    wandb = sys.modules.get("wandb")
    if wandb is not None:
        if wandb.run is not None:
            wandb.finish()  # or it would go on writing to a service that is gone
        wandb.teardown()
