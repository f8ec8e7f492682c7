"""The product lives in the repository's root: tests import it from there, wherever pytest is started."""

import os
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
torch.set_num_threads(1)      # the models are tiny: a second thread only spins

# What commands remember of known solutions stays out of the home of whoever runs the tests.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="polychromic-tests-")
