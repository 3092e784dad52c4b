"""Examples and documentation run as they are printed, each from an empty folder."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# What the same script does in seconds: `make nightly` runs it as it is printed.
QUICK = {
    "convert_and_distill.py": ["--teacher-steps", "4", "--steps", "2"],
    "measure_scaling.py": ["--seconds", "90", "--longest", "256"],
    "your_own_model.py": [],
}
EXPECTED = {
    "convert_and_distill.py": ["converted 4 layers to NSA", "student: KL", "'Return the"],
    "measure_scaling.py": ["lastk-5: N = 256", "favor-64: N = 256", "nsa-merged: N = 256", "page:"],
    "your_own_model.py": ["agrees with its definition", "largest weights: [19, 19]"],
}


def python_of(page):
    """All Python of a page, in order: one program, in which later blocks use earlier ones."""
    blocks = re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.M | re.S)
    return "\n".join(blocks)


def run(folder, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout


def copied(script, folder):
    (folder / script.name).write_bytes(script.read_bytes())
    return script.name


def check_output(script, output):
    for words in EXPECTED[script.name]:
        assert words in output, output


def test_every_example_is_tested_and_documented():
    assert [script.name for script in EXAMPLES] == sorted(QUICK) == sorted(EXPECTED)
    readme = PAGES[0].read_text()
    for script in EXAMPLES:
        assert f"examples/{script.name}" in readme
        assert f"    python {script.name}" in script.read_text()


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_examples_run(script, tmp_path):
    check_output(script, run(tmp_path, copied(script, tmp_path), *QUICK[script.name]))


@pytest.mark.slow
@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_examples_run_as_printed(script, tmp_path):
    check_output(script, run(tmp_path, copied(script, tmp_path)))


@pytest.mark.parametrize(
    "page", [p for p in PAGES if python_of(p)], ids=lambda p: p.relative_to(ROOT).as_posix()
)
def test_python_of_the_documentation_runs(page, tmp_path):
    """A folder named gpt2 stands for the model on the Hub."""
    torch.manual_seed(0)
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 64}
    GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0)).save_pretrained(
        tmp_path / "gpt2"
    )
    (tmp_path / "page.py").write_text(python_of(page))
    run(tmp_path, "page.py")
