"""One thread per process: the tests' tensors are small, and threads that wait for each other cost the time."""

import torch

torch.set_num_threads(1)
