"""One thread for torch, as a rank on a laptop has: more of them only wait for each other here."""

import torch

torch.set_num_threads(1)
