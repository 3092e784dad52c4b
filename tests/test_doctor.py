"""`attnopt doctor`: what it finds on this machine, and that it finds what is broken."""

import json
import shutil
import sys
from collections import namedtuple
from dataclasses import replace

import pytest

import attnopt.doctor as doctor
import attnopt.testing
from attnopt import cli

REQUIRES = ["torch>=2.7", "transformers>=5.0", 'peft>=0.17; extra == "lora"', "nowhere>=1"]


@pytest.fixture
def installed(monkeypatch):
    """An installation with these requirements and versions, to be changed by the test."""
    versions = {"attnopt": "0.1.0", "torch": "2.13.0+cpu", "transformers": "5.23.0"}
    metadata = {"Version": "0.1.0", "Requires-Python": ">=3.10"}
    monkeypatch.setattr(doctor.importlib.metadata, "metadata", lambda name: metadata)
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: REQUIRES)
    monkeypatch.setattr(doctor, "_version", versions.get)
    return versions


def by_name(findings):
    return {finding.name.strip(): finding for finding in findings}


def test_the_command_on_this_machine(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    path = tmp_path / "found.json"
    monkeypatch.setattr(sys, "argv", ["attnopt", "doctor", "--json", str(path)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    printed = capsys.readouterr().out
    found = json.loads(path.read_text())
    assert not stop.value.code, [f for f in found if f["state"] == "problem"]
    for section in ("Packages", "Devices", "Ops", "Hub", "Disk and memory"):
        assert section in printed and section in {f["section"] for f in found}
    eager = [f for f in found if f["name"].strip() == "eager"]
    assert len(eager) == 3 and all("right: error" in f["text"] for f in eager)
    assert "HF_HUB_OFFLINE is set" in next(f["text"] for f in found if f["section"] == "Hub")


def test_versions_out_of_range_and_missing_packages(installed):
    found = by_name(doctor._packages())
    assert found["torch"].state == found["Python"].state == "ok"
    assert found["nowhere"].state == "problem"
    assert "pip install 'nowhere>=1'" in found["nowhere"].text
    assert found["[lora]"].state == "note" and "attnopt[lora]" in found["[lora]"].text
    assert found["[dev]"].state == "ok"
    installed["transformers"] = "4.57.0"
    old = by_name(doctor._packages())["transformers"]
    assert old.state == "problem" and old.text == "4.57.0, but >=5.0 is needed"


def test_a_checkout_is_told_from_an_installation(monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    (finding,) = doctor._packages()
    assert finding.state == "note" and "checkout" in finding.text


def test_a_wrong_op_is_found(monkeypatch):
    real = [case for case in attnopt.testing.cases() if case.op == "lastk"]

    def halved(case):
        return replace(case, run=lambda x: {n: 0.5 * out for n, out in case.run(x).items()})

    monkeypatch.setattr(attnopt.testing, "cases", lambda: [halved(case) for case in real])
    found = by_name(doctor._ops())
    assert found["eager"].state == "problem" and "WRONG: error 5e-01" in found["eager"].text


def test_an_op_that_raises_is_found(monkeypatch):
    real = attnopt.testing.cases()

    def fail(inputs):
        raise RuntimeError("no kernel\nimage")

    monkeypatch.setattr(attnopt.testing, "cases", lambda: [replace(c, run=fail) for c in real])
    assert by_name(doctor._ops())["eager"].text == "RuntimeError: no kernel image"


def test_disks_that_are_full_or_locked(monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 2**20))
    assert by_name(doctor._room())["here"].state == "problem"
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    assert "cannot be written" in by_name(doctor._room())["here"].text


def test_what_cannot_be_examined_is_a_problem_not_a_crash(monkeypatch, capsys):
    def broken():
        raise ImportError("libcudart.so.13: cannot open shared object file")

    for name in ("_packages", "_devices", "_ops", "_hub", "_room"):
        monkeypatch.setattr(doctor, name, broken)
    found = doctor.examine()
    assert [f.state for f in found] == ["problem"] * 5
    monkeypatch.setattr(sys, "argv", ["attnopt", "doctor"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1 and "libcudart" in capsys.readouterr().out
