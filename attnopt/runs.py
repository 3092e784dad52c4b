"""What every training command does before and after: models, tokenizers, run folders."""

import sys
from collections.abc import Mapping
from dataclasses import MISSING, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import attnopt
from attnopt.checkpoints import check_model_folder, prepare_folder, write_folder, write_json
from attnopt.errors import UserError
from attnopt.trainer import DistillationArguments, DistillationTrainer

_VERSIONS = ("torch", "transformers", "datasets", "triton")


def load_model(path: str | Path) -> PreTrainedModel:
    """Load a causal language model, converted or not, from a folder or the Hub.

    Raises UserError when there is none, or its folder is a checkpoint that was cut short.
    """
    check_model_folder(Path(path))
    try:
        import attnopt.convert  # registers the converted model types

        return AutoModelForCausalLM.from_pretrained(str(path))
    except (OSError, ValueError) as error:
        raise _not_loaded("model", path, error) from error


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model's folder or Hub id; raises UserError when there is none."""
    try:
        return AutoTokenizer.from_pretrained(str(path))
    except (OSError, ValueError) as error:
        raise _not_loaded("tokenizer", path, error) from error
