"""The product lives in the repository's root: tests import it from there, wherever pytest is started."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
torch.set_num_threads(1)      # the models are tiny: a second thread only spins
