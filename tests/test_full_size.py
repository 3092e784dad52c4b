"""A GPT-2 of 124M parameters on a CPU: converted, distilled for a step, asked for text."""

import json
import resource
import subprocess
import sys

import pytest
import torch
from real_text import GPT2_TOKENIZER, ROOT, WIKITEXT_VALID, needs_real_text
from transformers import GPT2Config, GPT2LMHeadModel

GIB = 2**30
LIMIT = 16 * GIB
MEASURED = """
import atexit, resource
from attnopt.cli import main
usage = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
atexit.register(lambda: print("PEAK", usage()))
main()
"""


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config())
    assert sum(p.numel() for p in model.parameters()) == 124_439_808
    model.save_pretrained(folder)
    for name in ("vocab.json", "merges.txt"):
        (folder / name).write_bytes((GPT2_TOKENIZER / name).read_bytes())
    return folder


def peak_of(*arguments):
    """Run the command line in a process of its own, return its output and its peak memory."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, preexec_fn=limit_memory,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    output, _, peak = done.stdout.rpartition("PEAK ")
    return output, int(peak)


def limit_memory():
    """What the process maps beyond this fails: resident memory cannot exceed it either."""
    resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))


@pytest.mark.slow
@needs_real_text
@pytest.mark.parametrize(
    "attention",
    [("--window", 32, "--sinks", 4), ("--attention", "nsa", "--select-block", 32)],
    ids=["lastk", "nsa"],
)
def test_124m_parameters_within_16_gib(gpt2, attention, tmp_path):
    run = tmp_path / "run"
    _, trained = peak_of(
        "distill", "--model", gpt2, "--data", WIKITEXT_VALID, *attention, "--steps", 1,
        "--batch-size", 1, "--block-size", 512, "--max-train-tokens", 4096,
        "--max-eval-tokens", 1024, "--output", run,
    )  # fmt: skip
    logs = json.loads((run / "history.json").read_text())
    text, generated = peak_of(
        "generate", run, "--prompt", "The tower is", "--max-new-tokens", 20
    )
    assert "--- student" in text
    assert logs and max(trained, generated) < LIMIT
    print(f"peak: distill {trained / GIB:.1f} GiB, generate {generated / GIB:.1f} GiB")
