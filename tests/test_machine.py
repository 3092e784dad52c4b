"""What a result was measured on: facts, versions, the commit, and the ceilings."""

import json
import os
import subprocess
from types import SimpleNamespace

import pytest
import torch

import attnopt
from attnopt.bench import machine


def test_record_is_the_head_of_a_results_file():
    record = json.loads(json.dumps(machine.record("scaling", "attnopt bench", "cpu")))
    assert (record["kind"], record["format"], record["command"]) == ("scaling", 1, "attnopt bench")
    assert record["date"].endswith("+00:00")
    facts = record["machine"]
    assert facts["device"] == "cpu" and facts["name"] and facts["driver"] is None
    assert facts["cores"] >= 1 and facts["threads"] == torch.get_num_threads()
    assert facts["memory"] > 2**28
    assert record["versions"]["attnopt"] == attnopt.__version__
    assert record["versions"]["torch"] == torch.__version__
    assert "flash-attn" in machine.PACKAGES and "flash-attn" not in record["versions"]


def test_a_gpu_is_described(monkeypatch: pytest.MonkeyPatch):
    own = {"name": "NVIDIA X", "total_memory": 2**34, "major": 9, "minor": 0}
    own |= {"multi_processor_count": 132, "L2_cache_size": 2**25}
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(**own)
    )
    monkeypatch.setattr(machine, "_output", lambda *command: "580.1\n580.1")
    facts = machine.machine("cuda")
    expected = {"device": "cuda", "name": "NVIDIA X", "memory": 2**34, "capability": "9.0",
                "driver": "580.1", "multiprocessors": 132, "l2_bytes": 2**25}  # fmt: skip
    assert facts.items() >= expected.items()


def git(folder, *arguments):
    name = ["-c", "user.name=x", "-c", "user.email=x@y"]
    done = subprocess.run(
        ["git", "-C", folder, *name, *arguments], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def test_commit_of_a_checkout(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """Only of the folder itself: an installation inside another project has none."""
    assert machine.commit(tmp_path) is None
    git(tmp_path, "init", "-q")
    assert machine.commit(tmp_path) is None  # nothing is committed
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-qm", "a")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert machine.commit(tmp_path) == head
    (tmp_path / "b").write_text("untracked")
    assert machine.commit(tmp_path) == head
    (tmp_path / "a").write_text("2")
    assert machine.commit(tmp_path) == head + "-dirty"
    (tmp_path / "inner").mkdir()
    assert machine.commit(tmp_path / "inner") is None
    monkeypatch.setitem(os.environ, "PATH", "")
    assert machine.commit(tmp_path) is None


def test_ceilings():
    threads = torch.get_num_threads()
    found = machine.ceilings("cpu", [torch.float32, torch.bfloat16], scale=0.02)
    assert found["copy_bytes_per_s"] > 1e8
    assert set(found["matmul_flops_per_s"]) == {"float32", "bfloat16"}
    assert min(found["matmul_flops_per_s"].values()) > 1e7
    assert "5 MiB" in found["how"] and "20 x 20" in found["how"]
    assert torch.get_num_threads() == threads


def test_ceilings_count_bytes_and_operations(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "_best", lambda device, call: call() is None or 0.5)
    found = machine.ceilings("cpu", [torch.float32], scale=0.01)
    size = int(machine.COPY_BYTES["cpu"] * 0.01) // 4 * 4
    assert found["copy_bytes_per_s"] == pytest.approx(2 * size / 0.5)
    assert found["matmul_flops_per_s"]["float32"] == pytest.approx(2 * 10**3 / 0.5)
