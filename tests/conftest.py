"""One thread per process: the tests' tensors are small, and threads that wait for each other cost the time."""

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
