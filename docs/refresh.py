"""Put committed results into the documentation: tables of the READMEs, the README's picture.

    python docs/refresh.py [demo-report]

With the folder of a report of `make demo`, that becomes docs/results/demo first, the user's home
written as ~. Without, tables and picture are made anew from what is there. Tables of measurements
(`bench/results`) are those of `measured.py` beside this file.
"""

import json
import re
import runpy
import sys
from pathlib import Path

from matplotlib import rc_context

from attnopt.report.page import number, summary_tables
from attnopt.report.pictures import generation_panels, validation_panels
from attnopt.report.plots import line_panels
from attnopt.report.runs import Run
from attnopt.report.style import SETTINGS

ROOT = Path(__file__).resolve().parents[1]
MEASURED = runpy.run_path(str(ROOT / "docs" / "measured.py"))
RESULTS = ROOT / "docs" / "results" / "demo" / "report.json"
PICTURE = ROOT / "docs" / "demo.png"
TABLE = re.compile(r"(?<=<!-- demo table -->\n).*?(?=<!-- end -->)", re.S)


def read_runs() -> list[Run]:
    """The runs behind the committed report, without what pictures and tables do not need."""
    runs = json.loads(RESULTS.read_text())["runs"]
    kept = ("name", "label", "history", "evaluation", "generation")
    return [
        Run(about=run["run"], teacher=None, masks=None, **{k: run[k] for k in kept}) for run in runs
    ]


def table(runs: list[Run]) -> str:
    """The comparison as Markdown."""
    (compared,) = summary_tables([(run.label, run.evaluation) for run in runs])
    lines = ["| model | KL, nats/byte | perplexity ÷ teacher's | same top-1 token |"]
    lines.append("|---|---|---|---|")
    for row in compared["rows"]:
        scores = row["scores"]
        agreement = f"{100 * scores['top1_agreement']:.1f} %"
        name = ", ".join(filter(None, (row["model"], row["stage"])))
        cells = [name, number(scores["kl"], 3), number(scores["perplexity_ratio"]), agreement]
        lines.append(f"| {' | '.join(cells)} |")
    control = min(run.evaluation["control_self_only_kl"] for run in runs)
    lines.append(f"| control: every token sees only itself | {number(control, 3)} | | |")
    return "\n".join(lines) + "\n"


def adopt(folder: Path) -> None:
    """Copy a report and its numbers to docs/results/demo."""
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    for name in ("report.html", "report.json"):
        text = (folder / name).read_text(encoding="utf-8")
        (RESULTS.parent / name).write_text(text.replace(str(Path.home()), "~"), encoding="utf-8")


def main() -> None:
    """Adopt a report if one is named, then make table and picture."""
    if len(sys.argv) > 1:
        adopt(Path(sys.argv[1]))
    runs = read_runs()
    readme = ROOT / "README.md"
    readme.write_text(TABLE.sub(lambda _: table(runs), readme.read_text()))
    made = MEASURED["blocks"]()
    for page in MEASURED["PAGES"]:
        page.write_text(MEASURED["refresh"](page.read_text(), made))
    panels = [validation_panels(runs)[0], *generation_panels(runs)]
    with rc_context(SETTINGS):
        line_panels(panels).savefig(PICTURE, dpi=160, facecolor="white", bbox_inches="tight")


if __name__ == "__main__":
    main()
