"""Two processes on this machine, as torchrun or accelerate start them, and what FSDP is told."""

import os
import subprocess
import sys
from pathlib import Path

SUPPORT = Path(__file__).resolve().parent
# What `accelerate launch` hands to its processes for a config with `fsdp_version: 2`.
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
ECONOMICAL = {
    **FSDP,
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
}


def command(*arguments):
    """Arguments of `subprocess.run` for a module of Python, which finds this repository."""
    paths = [str(SUPPORT.parents[1]), os.environ.get("PYTHONPATH", "")]
    return {
        "args": [sys.executable, "-m", *map(str, arguments)],
        "env": os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        "stdout": subprocess.DEVNULL,
        "stderr": subprocess.PIPE,
        "text": True,
    }


def torchrun(*arguments):
    """The same for two processes, as torchrun starts them."""
    return command("torch.distributed.run", "--standalone", "--nproc-per-node", 2, *arguments)
