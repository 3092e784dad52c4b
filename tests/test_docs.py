"""The README: its numbers are those of the committed results, its commands and links exist."""

import json
import re
import runpy
from pathlib import Path

import pytest
import typer

import attnopt
from attnopt import cli

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_the_table_is_made_of_the_committed_results():
    docs = runpy.run_path(str(ROOT / "docs" / "refresh.py"))
    assert docs["TABLE"].search(README).group() == docs["table"](docs["read_runs"]()), (
        "run python docs/refresh.py"
    )


MEASURED = runpy.run_path(str(ROOT / "docs" / "measured.py"))


@pytest.mark.parametrize("page", MEASURED["PAGES"], ids=lambda page: page.parent.name)
def test_measured_tables_are_made_of_the_committed_results(page):
    text = page.read_text()
    assert text == MEASURED["refresh"](text, MEASURED["blocks"]()), "run python docs/refresh.py"


def test_every_measured_table_is_shown():
    shown = [name for page in MEASURED["PAGES"]
             for _, name, _ in MEASURED["BLOCK"].findall(page.read_text())]  # fmt: skip
    assert sorted(shown) == sorted(MEASURED["blocks"]())


def test_results_say_how_they_were_made():
    files = sorted((ROOT / "bench" / "results").glob("*.json"))
    assert files
    for path in files:
        record = json.loads(path.read_text())
        assert record["command"].startswith("attnopt bench"), path.name
        assert re.fullmatch(r"[0-9a-f]{40}", record["commit"]), f"{path.name}: {record['commit']}"
        assert record["machine"]["name"] and record["versions"]["torch"], path.name
        assert not record.get("interrupted")


TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS += sorted((ROOT / "kernels").glob("*/README.md"))
each_text = pytest.mark.parametrize("page", TEXTS, ids=lambda p: p.relative_to(ROOT).as_posix())


@each_text
def test_links_lead_somewhere(page):
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
        assert (page.parent / path).exists(), path


def test_make_targets_exist():
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
    assert set(re.findall(r"make (\w+)", README)) & {"demo", "test"} == {"demo", "test"}
    assert {"demo", "test", "lint", "bench", "nightly"} <= set(targets)


COMMAND = re.compile(r"^(?:attnopt|(?:torchrun|accelerate launch).* -m attnopt) (.*)", re.M)


@each_text
def test_commands_and_options_exist(page):
    commands = typer.main.get_command(cli.app).commands
    lines = COMMAND.findall(page.read_text().replace("\\\n", " "))
    assert len(lines) >= 4 or page != TEXTS[0]
    for line in lines:
        name, *words = line.split()
        options = {option for p in commands[name].params for option in p.opts}
        assert {word for word in words if word.startswith("--")} <= options, line


def test_names_of_the_package_exist():
    for name in re.findall(r"attnopt\.(\w+)\(", README):
        assert callable(getattr(attnopt, name)), name
