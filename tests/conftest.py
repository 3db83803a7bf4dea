import torch

torch.set_num_threads(1)  # the tests' matrices are tiny, and threads only wait for each other
