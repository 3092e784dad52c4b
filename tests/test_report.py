"""The report: every part of a run is shown, what is missing is said, nothing leaves the page."""

import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from attnopt import NSA, Favor, Routing
from attnopt.errors import UserError
from attnopt.report import load_runs, write_report
from attnopt.report.console import print_comparison
from attnopt.report.page import MEASURES, byte_count, number
from attnopt.report.pictures import loss_panels, position_panels, validation_panels
from attnopt.report.plots import Line, Panel, line_panels, smooth
from attnopt.report.runs import describe
from attnopt.report.style import color_of, svg

STEPS = 20


class Page(HTMLParser):
    """Collects tags, addresses and text, and checks that tags close in order."""

    VOID = {"meta", "br", "link", "img", "path", "use", "rect"}

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.addresses, self.words = [], [], [], []
        self.feed(text)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        names = ("src", "href", "xlink:href", "srcset", "data", "action")
        self.addresses += [v for k, v in attrs if k in names]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.words))


def report(tmp_path, *folders):
    page = write_report(list(folders), tmp_path / "out")
    assert page == tmp_path / "out" / "report.html"
    return page.read_text(), json.loads(page.with_suffix(".json").read_text())


@pytest.fixture(scope="module")
def full(write_run, tmp_path_factory):
    """The page and the numbers of a report on two complete runs."""
    folder = tmp_path_factory.mktemp("report")
    runs = write_run(folder / "a"), write_run(folder / "b", 12, 4, heads=2, ratio=1.015)
    return report(folder, *runs)


def test_the_page_needs_nothing_but_itself(full):
    page = Page(full[0])
    assert "script" not in page.tags
    assert "link" not in page.tags
    outside = [a for a in page.addresses if not a.startswith(("#", "data:"))]
    assert not outside
    assert not re.search(r"url\((?!#)|@import", full[0])


def test_every_section_is_there(full):
    page = Page(full[0])
    for words in (
        "last-3 and last-12 + 4 sinks against the teacher",
        "Control:",
        "1.62 nats",
        "How close the students are",
        "Coefficients over training",
        "Masks",
        "Cost of training",
        "Generation: time and memory",
        "What they write",
        "attnopt distill --data 'my text.txt'",
        "attnopt pretrain --data demo",
        "torch 2.13.0",
    ):
        assert words in page.text, words
    assert "Missing here" not in page.text
    # loss, validation, coefficients and masks of each run, training cost, generation
    assert page.tags.count("svg") == 8


def test_tables_hold_the_numbers(full):
    text = Page(full[0]).text
    for value in ("1.050", "1.015", "1.200", f"{math.log(1.05):#.4g}", "95.2 %"):
        assert value in text, value
    assert "my text.txt, test split, 4,096 tokens" in text
    assert re.search(r"256 2\.56 2\.56 256 kB 256 kB", text)
    assert "peak CPU memory" in text and "320.0" in text


def test_a_shared_teacher_has_one_row(full):
    table = full[0][full[0].index("How close") : full[0].index("Zero-shot is")]
    assert table.count("</span>teacher</th>") == 1
    assert table.count("zero-shot</td>") == 2


def test_text_is_escaped(full):
    assert "&lt;script&gt;x&lt;/script&gt;" in full[0]
    assert "a &lt;b&gt;" in full[0]
    assert "t &amp; t" in full[0]


def test_numbers_lie_beside_the_page(full):
    first, second = full[1]["runs"]
    assert first["label"] == "last-3"
    assert second["evaluation"]["models"]["student"]["perplexity_ratio"] == 1.015
    assert first["cost"] == {
        "steps": STEPS,
        "wall_seconds": 10.0,
        "cpu_seconds": 8.0,
        "peak_cpu_memory_mib": 320.0,
    }
    assert len(first["history"]["rows"]) == STEPS
    assert first["masks"]["layers"]["0"][0][1] == [0.3333, 0.3333, 0, 0, 0, 0]


def test_pictures_take_the_color_of_the_page(full):
    assert "#010203" not in full[0]
    assert "currentColor" in full[0]


def with_text(run, loss=2.0):
    """Add to a run's evaluation what its commands add to it: positions, windows and texts."""
    evaluation = json.loads((run / "evaluation.json").read_text())
    models, shift = ("teacher", "zero-shot", "student"), {"teacher": 0.0, "zero-shot": 0.5}
    losses = {name: loss + shift.get(name, 0.25) for name in models}
    evaluation |= {
        "by_position": {
            "ends": [1, 2, 4, 7],
            "models": {n: {"kl": [0.0, x, 0.1, None], "ce": [x] * 4} for n, x in losses.items()},
        },
        "strided": {
            "stride": 128,
            "models": {
                n: {"perplexity": 77 + x, "perplexity_ratio": 1.0} for n, x in losses.items()
            },
        },
        "text": {
            "settings": {"continuations": 128, "prompt_tokens": 64, "new_tokens": 99}
            | {"seed": 0, "temperature": 0.8, "top_k": 0, "top_p": 0.95},
            "models": {
                n: {key: {"value": x, "low": x - 0.3, "high": x + 0.5} for key in MEASURES}
                for n, x in losses.items()
            },
            "samples": [{"prompt": "Once", **{n: f"{n} <wrote>" for n in models}}],
        },
    }
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    return run


def test_long_texts_and_what_models_write(write_run, tmp_path, capsys):
    runs = with_text(write_run(tmp_path / "a")), with_text(write_run(tmp_path / "b", 12))
    html, numbers = report(tmp_path, *runs)
    page = Page(html)
    for words in (
        "windows that begin 128 tokens apart",
        "79.00",
        "128 continuations of 99 tokens after 64 of held-out text; temperature 0.8, top-p 0.95",
        "2.25 ±0.4",
        *(name for name in MEASURES.values()),
        "tokens of context",
    ):
        assert words in page.text.replace("‑", "-"), words
    assert numbers["runs"][1]["evaluation"]["text"]["models"]["student"]["nll"]["low"] == 1.95
    assert page.tags.count("svg") == 9 and page.tags.count("table") == 7
    # one teacher for both, and generation.json has the samples
    assert html.count("</span>teacher</th>") == 3 and "wrote" not in html
    ce, kl = position_panels(load_runs(runs))
    assert [line.label for line in ce.lines] == ["teacher", "", "last-3", "", "last-12"]
    assert [line.label for line in kl.lines] == ["", "last-3", "", "last-12"]
    assert (kl.lines[1].x, kl.lines[1].y) == ((1, 2, 4), (0.0, 2.25, 0.1))
    (runs[0] / "generation.json").unlink()
    html = report(tmp_path, *runs)[0]
    assert "last-3, zero-shot</h4><pre>zero-shot &lt;wrote&gt;" in html
    print_comparison([(run.label, run.evaluation) for run in load_runs(runs)])
    shown = capsys.readouterr().out
    for words in ("windows 128 tokens apart", "79.50", "128 texts of 99 tokens", "±0.4"):
        assert words in shown, words


@pytest.mark.parametrize("part", ["history", "evaluation", "generation", "masks"])
def test_a_missing_part_is_said_to_be_missing(write_run, part, tmp_path):
    html, numbers = report(tmp_path, write_run(tmp_path / "a", skip=[part]))
    page = Page(html)
    assert f"no {part}.json" in page.text.replace(" .json", ".json")
    assert numbers["runs"][0]["missing"] == [part]
    absent = {
        "history": "Coefficients over training",
        "evaluation": "How close",
        "generation": "What they write",
        "masks": "Masks ",
    }
    assert absent[part] not in page.text


def test_a_run_that_has_only_begun(write_run, tmp_path):
    everything = ["history", "evaluation", "generation", "masks"]
    page = Page(report(tmp_path, write_run(tmp_path / "a", skip=everything))[0])
    assert "svg" not in page.tags
    assert "How to repeat it" in page.text


def test_a_weak_teacher_is_called_weak(write_run, tmp_path):
    html, _ = report(tmp_path, write_run(tmp_path / "a", control=0.49))
    assert "Draw no conclusions" in html
    html, _ = report(tmp_path, write_run(tmp_path / "b", control=0.51))
    assert "Draw no conclusions" not in html


def test_only_terms_that_were_trained_are_drawn(write_run, tmp_path):
    run = write_run(tmp_path / "a")
    assert "total loss" not in report(tmp_path, run)[0]
    about = json.loads((run / "run.json").read_text())
    about["training"] |= {"l1_weight": 0.1}
    (run / "run.json").write_text(json.dumps(about))
    html, _ = report(tmp_path, run)
    assert "total loss" in html and "KL to the teacher<" in html


def test_the_matching_stage_has_its_own_panel_and_a_border(write_run, tmp_path):
    plain, run = write_run(tmp_path / "a"), write_run(tmp_path / "b", 7)
    before = report(tmp_path, plain)[0]
    about, history = (json.loads((run / f"{n}.json").read_text()) for n in ("run", "history"))
    about["training"] |= {"match_steps": 5, "l1_weight": 0.1}
    for row in history["rows"][:5]:
        row["match"] = row["loss"] = 77.0
        del row["kl"]
    (run / "run.json").write_text(json.dumps(about))
    (run / "history.json").write_text(json.dumps(history))
    html, _ = report(tmp_path, plain, run)
    for words in ("error of attention, before the KL", "end of attention matching"):
        assert words in html and words not in before
    kl, perplexity, top1 = validation_panels(load_runs([plain, run]))
    assert kl.borders == perplexity.borders == top1.borders == [(5, color_of(1))]
    drawn = [line for line in line_panels([kl]).axes[0].lines if line.get_linestyle() == ":"]
    assert [line.get_xdata()[0] for line in drawn] == [5]
    panels = {panel.title: panel for panel in loss_panels(load_runs([plain, run]))}
    assert max(max(line.y) for line in panels["total loss"].lines) < 10
    assert [line.y for line in panels["error of attention, before the KL"].lines] == [[77.0] * 5]


def test_a_mechanism_without_coefficients(write_run, tmp_path):
    run = write_run(tmp_path / "a")
    history = json.loads((run / "history.json").read_text())
    history |= {"labels": {}, "coefficients": [{"step": 0, "layers": {"0": {}, "1": {}}}]}
    (run / "history.json").write_text(json.dumps(history))
    (run / "masks.json").write_text('{"layers": {}}')
    page = Page(report(tmp_path, run)[0])
    assert "Coefficients over training" not in page.text and "Masks " not in page.text
    assert "Missing here" not in page.text


def test_nan_does_not_reach_the_json(write_run, tmp_path):
    run = write_run(tmp_path / "a")
    history = json.loads((run / "history.json").read_text())
    history["rows"][3]["kl"] = math.nan
    (run / "history.json").write_text(json.dumps(history))
    _, numbers = report(tmp_path, run)
    assert numbers["runs"][0]["history"]["rows"][3]["kl"] is None


def test_equal_configs_are_told_apart_by_folder(write_run, tmp_path):
    html, _ = report(tmp_path, write_run(tmp_path / "a"), write_run(tmp_path / "b"))
    assert "last-3 (a)" in html and "last-3 (b)" in html


def test_user_mistakes(write_run, tmp_path):
    with pytest.raises(UserError, match="at least one run folder"):
        write_report([], tmp_path)
    with pytest.raises(UserError, match="is not a run folder: it has no run.json"):
        write_report([tmp_path], tmp_path)
    run = write_run(tmp_path / "a")
    (run / "history.json").write_text('{"rows": [')
    with pytest.raises(UserError, match=r"cannot read .*history.json"):
        write_report([run], tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the report"):
        write_report([write_run(tmp_path / "b")], tmp_path / "file")


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"mechanism": "lastk", "window": 5}, "last-5"),
        ({"mechanism": "lastk", "window": 32, "sinks": 4}, "last-32 + 4 sinks"),
        (Routing(16, 32).to_dict(), "routing 16 + last 32"),
        ({"mechanism": "lastk", "window": 2, "per_head": True}, "last-2, per head"),
        ({"mechanism": "lastk", "window": 2, "sinks": 1}, "last-2 + 1 sink"),
        ({"mechanism": "masks", "candidates": [{}] * 3}, "3 masks"),
        ({"0": {"mechanism": "lastk", "window": 5}, "1": {"mechanism": "lastk", "window": 9}},
         "last-5 / last-9"),
        (Favor(64, window=33).to_dict(), "performer M=64 + last 33"),
        (Favor(norms="constant").to_dict(), "performer M=128"),
        (Favor(64, learned=True).to_dict(), "kerformer M=64"),
        (Favor(feature_map="hedgehog", window=1).to_dict(), "hedgehog + last 1"),
        (Favor(feature_map="taylor", window=33).to_dict(), "based + last 33"),
        ({"0": Favor(8, "relu").to_dict(), "1": {"mechanism": "lastk", "window": 9}},
         "relu M=8 / last-9"),
        (NSA(select_block=16, num_selected=2, window=32).to_dict(), "nsa 2x16 + last 32"),
        (NSA(combine="gates").to_dict(), "nsa gates 4x32 + last 128"),
        (None, "student"),
    ],
)  # fmt: skip
def test_short_names(config, name):
    assert describe(config) == name


def test_numbers_are_short():
    assert [number(x) for x in (None, 0.0, 3, 0.056871, 1.0523, 12.346, 12345.6)] == [
        "–", "0", "3", "0.05687", "1.052", "12.35", "12,346",
    ]  # fmt: skip
    assert [byte_count(x) for x in (None, 20480, 4.19e6)] == ["–", "20 kB", "4.19 MB"]


def test_the_moving_average_has_no_bias():
    assert smooth([3.0] * 5) == pytest.approx([3.0] * 5)
    assert smooth([0.0, 1.0], weight=0.5) == pytest.approx([0.0, 2 / 3])


def test_line_ends_are_labeled_without_overlap():
    lines = [Line(f"run {i}", "#123456", [0, 1], [0, 1 + i / 1000]) for i in range(5)]
    figure = line_panels([Panel("title", "step", lines)])
    heights = sorted(text.xy[1] for text in figure.axes[0].texts)
    gaps = np.diff(heights)
    assert len(heights) == 5 and gaps.min() > 0.03
    assert heights[-1] <= 1.0
    assert 'aria-label="a &lt;b&gt; &quot;c&quot;"' in svg(figure, 'a <b> "c"')
