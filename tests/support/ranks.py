"""Distillations in several processes, one after the other: `torchrun ranks.py JOBS`.

JOBS is JSON, a list of [teacher, text, folder, settings of accelerate, options of `tiny_runs.run`].
"""

import importlib
import json
import os
import sys

import fsdp_on_cpu  # noqa: F401
import torch
from tiny_runs import run

torch.set_num_threads(1)
module = importlib.import_module("attnopt.distill")
finish = module.finish_distributed
module.finish_distributed = torch.distributed.barrier  # one group serves all jobs
for teacher, text, folder, settings, options in json.loads(sys.argv[1]):
    for name in [n for n in os.environ if n.startswith(("FSDP_", "ACCELERATE_"))]:
        del os.environ[name]
    os.environ.update(settings)
    run(teacher, text, folder, **options)
finish()
