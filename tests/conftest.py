"""Every test finds the project's files, computes on one thread and draws the same numbers in any order."""
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
torch.set_num_threads(1)  # tiny tensors: a second thread costs more than it computes


@pytest.fixture(autouse=True)
def same_random_numbers():
    torch.manual_seed(0)
