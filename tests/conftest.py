"""Settings every test runs under. They must be made before triton or transformers is imported."""

import atexit
import json
import math
import os
import shutil
import tempfile

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    torch.set_num_threads(1)

os.environ.setdefault("HF_HUB_OFFLINE", "1")

if "HF_HOME" not in os.environ:  # xdist workers inherit the folder of the process that made it
    os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="attnopt-tests-")
    atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)


def _write_run(folder, window=3, sinks=0, heads=1, ratio=1.05, control=1.62, skip=()):
    """A small run folder with every part that `skip` does not name."""
    coefficients = {"offsets": [f"{n} back" for n in range(window)]}
    if sinks:
        coefficients["sinks"] = [f"token {n}" for n in range(sinks)]

    def values(step):
        rows = {k: [[0.5 + 0.01 * step] * len(v)] * heads for k, v in coefficients.items()}
        return rows if heads > 1 else {k: v[0] for k, v in rows.items()}

    def model(r):
        kl = math.log(r)
        return {"kl": kl, "reverse_kl": kl, "ce": 1.7 + kl, "perplexity": 5.47 * r} | {
            "perplexity_ratio": r,
            "top1_agreement": 1 / r,
        }

    rows = [
        {"step": s, "loss": 2 / s + 0.1, "kl": 1 / s, "wall_seconds": 0.5 * s}
        | {"cpu_seconds": 0.4 * s, "cpu_memory_mb": 300.0 + s, "gpu_memory_mb": None}
        | ({"eval_kl": 1 / s, "eval_perplexity": 6.0, "eval_top1": 0.9} if s % 5 == 0 else {})
        for s in range(1, 21)
    ]
    parts = {
        "run": {
            "command": "distill",
            "argv": ["attnopt", "distill", "--data", "my text.txt"],
            "versions": {"torch": "2.13.0"},
            "data": "my text.txt",
            "attention": {"mechanism": "lastk", "window": window, "sinks": sinks},
            "training": {"learning_rate": 0.001, "kl_weight": 1.0, "ce_weight": 0.0},
            "teacher": str(folder / "teacher"),
        },
        "history": {
            "rows": rows,
            "coefficients": [
                {"step": s, "layers": {"0": values(s), "1": values(s)}} for s in (0, 10, 20)
            ],
            "labels": {"0": coefficients, "1": coefficients},
        },
        "evaluation": {
            "data": "my text.txt",
            "split": "test",
            "tokens": 4096,
            "control_self_only_kl": control,
            "warning": "hardly uses attention" if control < 0.5 else None,
            "models": {"teacher": model(1.0), "zero-shot": model(1.2), "student": model(ratio)},
        },
        "generation": {
            "settings": {"temperature": 0.7},
            "samples": [{"prompt": "a <b>", "teacher": "t & t", "student": "<script>x</script>"}],
            "timing": [
                {"model": m, "new_tokens": n, "seconds": n / 100, "cache_bytes": n * 1000}
                for m in ("teacher", "student")
                for n in (16, 64, 256)
            ],
        },
        "masks": {"layers": {"0": np.tril(np.full((heads, 6, 6), 1 / 3)).tolist()}},
    }
    (folder / "teacher").mkdir(parents=True)
    made = {"argv": ["attnopt", "pretrain", "--data", "demo"]}
    (folder / "teacher" / "pretrain.json").write_text(json.dumps(made))
    for part in parts.keys() - set(skip):
        (folder / f"{part}.json").write_text(json.dumps(parts[part]))
    return folder


@pytest.fixture(scope="session")
def write_run():
    """Function that writes a small run folder as the commands would: see _write_run."""
    return _write_run


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A text file of 300 lines that a small model can learn something from."""
    from squares import write_squares

    return write_squares(tmp_path_factory.mktemp("text") / "text.txt", 300)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The folder of a tiny teacher with its tokenizer."""
    from tiny_runs import write_teacher

    return write_teacher(tmp_path_factory.mktemp("teacher") / "model")
