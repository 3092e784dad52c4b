"""What the server of cell processes imports once, before it forks them; peers where installed."""

import contextlib
import importlib
import io
import warnings

import torch

from attnopt.bench import contenders as _contenders

PEERS = ("fla.ops.linear_attn.naive", "performer_pytorch", "native_sparse_attention_pytorch")

torch.set_num_threads(1)
_contenders.contenders(_contenders.LEVELS)
# a process imports the main module of its parent again: of the command, that is the command line
for _name in ("attnopt.cli", "transformers.models.gpt2.modeling_gpt2", *PEERS):
    with contextlib.suppress(Exception), contextlib.redirect_stderr(io.StringIO()):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(_name)
