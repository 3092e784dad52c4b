"""Settings every test runs under. They must be made before triton or transformers is imported."""

import atexit
import os
import shutil
import tempfile

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    torch.set_num_threads(1)

os.environ.setdefault("HF_HUB_OFFLINE", "1")

if "HF_HOME" not in os.environ:  # xdist workers inherit the folder of the process that made it
    os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="attnopt-tests-")
    atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)
