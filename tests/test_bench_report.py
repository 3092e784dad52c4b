"""The report of measured scaling: what the file says, losses like gains, nothing else."""

import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from bench_results import CONTENDERS, LENGTHS, cell, gpu_check, roofline, scaling
from rich.console import Console

from attnopt.bench.report import print_summary, summary_table, write_report
from attnopt.bench.report.pictures import Plot, colors_of, draw
from attnopt.bench.report.tables import curves, trend, verdict
from attnopt.bench.report.text import listing, plain, quantities, quantity, tokens
from attnopt.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


class Page(HTMLParser):
    """Tags, addresses, words outside pictures and rows of tables; tags must close in order."""

    VOID = {"meta", "br", "path", "use", "rect"}

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.addresses, self.words, self.rows = [], [], [], [], []
        self.feed(text)
        assert not self.open, f"never closed: {self.open}"
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [v for k, v in attrs if k in ("src", "href", "xlink:href", "action")]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
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
        if "svg" in self.open or "style" in self.open:
            return
        self.words.append(data)
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


def write(folder, *records):
    """Write files and the report on them; the page's text."""
    files = [folder / f"results-{i}.json" for i in range(len(records))]
    for file, record in zip(files, records, strict=True):
        file.write_text(json.dumps(record))
    return write_report(files, folder / "page.html").read_text()


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A page on a scaling run, a check and predictions."""
    return write(tmp_path_factory.mktemp("bench"), scaling(), gpu_check(), roofline())


@pytest.fixture(scope="module")
def page(full):
    return Page(full)


def test_the_page_needs_nothing_but_itself(full, page):
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert "<script" not in full
    assert not [a for a in page.addresses if not a.startswith("#")]
    assert not re.search(r"url\((?!#)|@import", full)
    assert "#010203" not in full and "currentColor" in full
    assert "prefers-color-scheme: dark" in full


def test_what_was_measured_is_said(page):
    for words in (
        "Measured on Some CPU", "Some CPU (cpu), cores 2, threads 1, memory 8.00 GB",
        "attnopt 1.2.3, torch 2.9.9", "attnopt bench --budget 9m", "abc1234-dirty",
        "2026-01-02T03:04:05", "543 s", "float32, B=1 H=12 D=64", "512, 1,024, 2,048, 4,096, 8,192",
        "CPU time, the median of rounds", "(3 rounds)",
        "copy 10.0 GB/s, float32 matmul 50.0 GFLOP/s (said so)", "its own epsilon",
        "some-peer 1.2.3",
    ):  # fmt: skip
        assert words in page.text, words


def test_the_table_of_cells_is_the_file(tmp_path):
    """Every row against numbers worked out here, with no row more and none less."""
    record = scaling(("fwd",))
    found = Page(write(tmp_path, record))
    rows = [row for row in found.rows if len(row) == 9 and row[0] != "contender"]
    expected = []
    for one in record["cells"]:
        if one["status"] != "ok" or one["errors"].get("dk"):
            continue
        name, n = one["contender"], one["N"]
        low, middle, high = (quantity(np.quantile(one["times"], q), "s") for q in (0.25, 0.5, 0.75))
        floor = max(2e3 * n / 1e10, 1e3 * n / 5e10)
        percent = plain(100 * floor / sorted(one["times"])[1], " %")
        dense = {"lastk": 1e-2 * n, "favor": n / 1024 / math.sqrt(2), "peer": 1e-5 * n}
        speedup = plain(dense.get(name, 1e-3 * n), "×") if "sdpa" != name != "layer-dense" else "–"
        both = f"{speedup} – {speedup}" if speedup != "–" else "–"
        label = record["contenders"][name]["label"]
        expected.append([label, f"{n:,}", middle, f"{low} – {high}", quantity(1e3 * n, "B"),
                         speedup, both, percent, "3.0e-07 (out) ≤ 1.0e-05"])  # fmt: skip
    assert sorted(rows) == sorted(expected)


def test_gains_and_losses_are_told_alike():
    found = {curve.name: verdict(trend(curve)) for curve in curves(scaling(("fwd",)))}
    assert found["lastk"] == (
        "forward: time grows as N^1.00 ± 0.00 (3 lengths from N = 2,048), memory as N^1.00 ± 0.00; "
        "ahead of SDPA everywhere measured, from N = 512; largest speed-up 81.9× (N = 8,192); "
        "nowhere slower, at the least 5.12× faster (N = 512)"
    )
    assert found["favor"].endswith(
        "ahead of SDPA from N ≈ 1,400; largest speed-up 5.66× (N = 8,192); "
        "largest slow-down 2.83× (N = 512)"
    )
    assert found["peer"].endswith(
        "never ahead of SDPA up to N = 8,192; nowhere faster, at the least 12.2× slower "
        "(N = 8,192); largest slow-down 195× (N = 512)"
    )
    assert found["sdpa"].endswith("(3 lengths from N = 2,048), memory as N^1.00 ± 0.00")


def test_a_partner_that_was_measured_elsewhere():
    record = scaling(("fwd",))
    record["cells"] = [
        one for one in record["cells"] if (one["contender"] == "sdpa") == (one["N"] < 2048)
    ]
    found = {curve.name: verdict(trend(curve)) for curve in curves(record)}
    assert found["lastk"].endswith("; no length in common with SDPA")


def test_losing_regimes_are_on_the_page(page):
    assert "largest slow-down 2.83× (N = 512)" in page.text
    (row,) = [row for row in page.rows if row[:1] == ["a peer"] and row[-1] == "195× (N = 512)"][:1]
    assert row[-3:-1] == ["never", "none"]


def test_pictures_show_losses_at_one_scale():
    """The line at 1 and the points below it are inside the axes."""
    (picture,) = draw([Plot("speed-up", str, [("slow", "#123456", [(512, 0.1), (1024, 0.5)])], 1)])
    assert picture.count("#123456") >= 1 and "slow" in picture
    assert ">0.1<" in picture and ">1.0<" in picture


def test_only_predictions_are_dashed():
    lines = [("op", "#123456", [(512, 0.1), (1024, 0.5)])]
    assert "dasharray" in draw([Plot("time", str, lines, predicted=True)])[0]
    assert "dasharray" not in draw([Plot("time", str, lines)])[0]


def test_every_phase_and_level_has_pictures_of_its_own(full, page):
    titles = re.findall(r"<h3>([^<]*)</h3>", full)
    for title in ("alone, forward", "alone, one decoding step", "layer, forward"):
        assert f"Attention {title}" in titles
    # the run: 3 groups of two rows; the check: 2 groups of two; 2 chips: times and speed-ups
    assert page.tags.count("svg") == 6 + 4 + 4
    for name in ("time", "peak memory above the inputs", "speed-up over dense", "percent of the"):
        assert name in full


def test_files_are_never_mixed(full):
    first, second = full.index("results-0.json"), full.index("results-1.json")
    assert full.index("results-2.json") > second > first
    assert full[:second].count("<svg") == 6, "the first file's pictures come before the second's"


def test_what_is_not_reported_is_said_and_why(page):
    rows = [row for row in page.rows if len(row) == 6]
    size = "float32, B=1 H=12 D=64"
    phase = "attention alone, forward + backward"
    assert ["a peer", phase, size, "1k, 2k", "out of memory", "needs 99 GiB"] in rows
    reason = "error of dk 5.0e-01; limit 1.0e-05"
    assert ["FAVOR+", phase, size, "512", "failed its check", reason] in rows
    assert ["flex", "–", "–", "–", "not run", "needs a GPU"] in rows


def test_predictions_are_marked(full, page):
    start = full.index("<h2>Predictions, not measurements</h2>")
    part, before = Page("<section>" + full[start:full.rindex("</body>")]), full[:start]
    assert "Nothing in this part was measured" in part.text
    rows = [row for row in part.rows if row and row[0] in ("lastk", "favor")]
    assert len(rows) == 16
    assert all(entry.startswith("≈ ") for row in rows for entry in row[3:6])
    assert ["lastk", "forward", "1,024", "≈ 3.07 µs", "≈ 1.05 µs", "≈ 0.341×", "bandwidth"] in rows
    assert len(re.findall("<figcaption>Predicted for .*, not measured", full[start:])) == 4
    titles = re.findall("<h3>(.*)</h3>", full[start:])
    assert titles == ["What the predictions assume", "Predicted for H100", "Predicted for T4"]
    assert ["bandwidth_share", "0.8"] in part.rows
    assert "≈ 3.07 µs" not in before and "H100" not in before


def test_the_numerics_of_a_check(page):
    assert "Numerics: 1 of 3 cases within their limits" in page.text
    assert "This was a rehearsal." in page.text and "The check failed:" in page.text
    assert ["nsa/fwd/a", "out 1.0e-04 (4.0e-03), dq 2.0e-04 (5.0e-03)"] in page.rows
    assert ["favor/bwd/b", "dk not finite (5.0e-03), dk is off by 0.7"] in page.rows
    assert ["lastk/fwd/c", "no time left"] in page.rows
    assert ["memcheck", "ok", "ERROR SUMMARY: 0"] in page.rows
    assert ["sweep", "cut", "3 groups not begun"] in page.rows
    assert "_lost_kernel" in page.text


def test_hostile_strings_are_text(tmp_path):
    """Nothing from a file becomes markup, a formula or a style."""
    evil = "<script>$x^{$</script>\"'&"
    record = scaling(("fwd",), LENGTHS[:2])
    for entry in record["contenders"].values():
        entry |= {"label": evil, "note": evil, "library": evil, "mechanism": evil, "level": evil}
    for one in record["cells"]:
        one["contender"] = evil if one["contender"] == "lastk" else one["contender"]
        one["dtype"] = evil
        one["reason"] = evil
    record["contenders"][evil] = record["contenders"].pop("lastk")
    record |= {"command": evil, "commit": evil, "versions": {evil: evil}, "missing": {evil: evil}}
    record["machine"] = {"device": evil, "name": evil}
    predicted = roofline()
    for row in predicted["rows"]:
        row |= {"op": evil, "chip": evil, "phase": evil, "bound": evil}
    html = write(tmp_path, record, predicted | {"assumptions": {evil: evil}})
    assert "<script" not in html
    assert html.count("&lt;script&gt;") > 20
    assert evil in Page(html).text


def test_one_point_no_partner_no_bytes_no_ceilings(tmp_path):
    record = scaling(("fwd",), (512,))
    record["ceilings"] = None
    for one in record["cells"]:
        one["bytes"] = None if one["contender"] == "lastk" else 0
    for entry in record["contenders"].values():
        entry |= {"partner": None, "version": None}
    record["contenders"]["favor"]["partner"] = "not in this file"
    html = write(tmp_path, record)
    found = Page(html)
    assert "one length measured (N = 512), so no law of growth" in found.text
    assert "ceilings not measured" in found.text
    assert "(version not recorded)" in found.text
    row = next(row for row in found.rows if row[:2] == ["last-5", "512"])
    assert row[4:8] == ["–", "–", "–", "–"]
    titles = re.findall('aria-label="(.*?)"', html)
    assert titles == ["time by number of tokens"] * 2


def test_a_file_without_a_reported_cell(tmp_path):
    record = scaling(("fwd",), (512,))
    record["cells"] = [one | {"status": "error", "reason": "lost"} for one in record["cells"][:2]]
    found = Page(write(tmp_path, record))
    assert "No contender of this project has a reported time" in found.text
    assert "svg" not in found.tags
    assert summary_table(record)[1:] == []


def test_summary():
    head, *rows = summary_table(scaling())
    assert head == ["contender", "level", "phase", "N", "time", "growth", "speed-up", "ahead"]
    found = {(row[0], row[2]): row[3:] for row in rows}
    assert len(rows) == len(found) == 10
    assert found["FAVOR+", "forward"] == [
        "4k, 8k", "5.93, 11.9 ms", "N^1.00 ± 0.00", "5.66×", "N ≈ 1,400"
    ]  # fmt: skip
    assert found["a peer", "decode"][-2:] == ["0.0819×", "never"]
    assert found["last-5", "forward"][-2:] == ["81.9×", "everywhere"]
    assert found["SDPA", "forward"][-2:] == ["–", "–"]


def test_summary_uses_the_lengths_that_dense_attention_reached():
    record = scaling(("fwd",))
    record["cells"] = [
        one for one in record["cells"] if one["contender"] != "sdpa" or one["N"] < 2048
    ]
    rows = {row[0]: row for row in summary_table(record)}
    assert rows["last-5"][3] == "512, 1k" and rows["last-5"][6] == "10.2×"
    assert "N^1.00" in rows["last-5"][5], "growth is fitted to all its lengths"


def test_sizes_are_a_column_only_where_there_are_several():
    record = scaling(("fwd",))
    record["cells"] += [one | {"B": 4} for one in record["cells"] if one["contender"] == "sdpa"]
    head, *rows = summary_table(record)
    assert head[3] == "sizes"
    assert {row[3] for row in rows} == {f"float32, B={b} H=12 D=64" for b in (1, 4)}


def test_the_printed_summary_fits_a_terminal(capsys):
    record = scaling()
    record["cells"].append(cell("peer", "decode", 16384, 1.0) | {"status": "not run"})
    print_summary(record, Console(width=100))
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100 and "…" not in printed
    printed = re.sub(r"\s+", " ", printed)
    for words in (
        "attention layer, forward (float32", "5.93, 11.9 ms", "0.0819× never",
        "N = 1k, 2k: out of memory; needs 99 GiB", "Cells that were not run: 1",
    ):  # fmt: skip
        assert words in printed, words


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kind": "builds"}, "key 'kind' must be one of scaling, gpu-check, roofline; got 'buil"),
        ({"kind": []}, "key 'kind' must be one of"),
        ({"format": 2}, "key 'format' must be 1, got 2"),
        ({"cells": None}, "key 'cells' must be a list, got None"),
        ({"machine": None}, "key 'machine' must be an object"),
        ({"machine": {"device": "cpu"}}, "machine has no key 'name'"),
        ({"contenders": {"sdpa": {}}}, "contenders.sdpa has no key 'label'"),
        ({"cells": [{"N": 1}]}, r"cells\[0\] has no key 'phase'"),
        ({"cells": ["x"]}, r"cells\[0\] has no key 'phase'"),
        ({"cells": [cell("who", "fwd", 1, 1.0)]}, r"cells\[0\].contender 'who' is not among"),
        ({"cells": [cell("sdpa", "fwd", 1, 1.0)] * 2}, r"cells\[1\] repeats the cell of sdpa fwd"),
        ({"cells": [cell("sdpa", "fwd", 1, 1.0, times=[])]}, "times must be positive seconds"),
        ({"cells": [cell("sdpa", "fwd", 1, 1.0, times=[0.0])]}, "must be positive seconds"),
        ({"cells": [cell("sdpa", "fwd", 1, math.nan)]}, "must be positive seconds"),
        ({"kind": "gpu-check"}, "key 'sanitizer' must be a list"),
        ({"kind": "roofline"}, "key 'rows' must be a list"),
        ({"kind": "roofline", "rows": []}, "key 'assumptions' must be an object"),
        ({"kind": "roofline", "rows": [{"op": "x"}]}, r"rows\[0\] has no key 'phase'"),
    ],
)
def test_bad_files_are_refused_in_one_line(tmp_path, change, said):
    with pytest.raises(UserError, match=said) as refusal:
        write(tmp_path, scaling(("fwd",), LENGTHS[:2]) | change)
    assert "results-0.json" in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_timed_cell_needs_all_its_keys(tmp_path):
    record = scaling(("fwd",), LENGTHS[:2])
    del record["cells"][3]["flops"]
    with pytest.raises(UserError, match=r"cells\[3\] has no key 'flops'"):
        write(tmp_path, record)


def test_other_mistakes(tmp_path):
    with pytest.raises(UserError, match="at least one results file"):
        write_report([], tmp_path)
    with pytest.raises(UserError, match="cannot read .*none.json: No such file"):
        write_report([tmp_path / "none.json"], tmp_path)
    file = tmp_path / "file.json"
    for content, said in ((b"{", "is not JSON"), (b"\xff\xfe", "is not JSON"),
                          (b"[]", "must hold one JSON object, got a list")):  # fmt: skip
        file.write_bytes(content)
        with pytest.raises(UserError, match=said):
            write_report([file], tmp_path)
    file.write_text(json.dumps(roofline() | {"rows": []}))
    with pytest.raises(UserError, match="cannot write the report to"):
        write_report([file], file)
    assert write_report([file], tmp_path / "new") == tmp_path / "new" / "bench.html"


def test_numbers_in_words():
    assert [quantity(x, "s") for x in (None, 0, 12.34e-3, 9.996e-4, 59.96, 1234.5, 3e-12)] == [
        "–", "0 s", "12.3 ms", "1.00 ms", "60.0 s", "1.23 ks", "0.00300 ns",
    ]  # fmt: skip
    assert [quantities(x, "s") for x in ([0.9], [0.1, 0.9], [0.9, 9])] == [
        "900 ms", "100, 900 ms", "900 ms, 9.00 s",
    ]  # fmt: skip
    assert [plain(x) for x in (0.00512, 0.9996, 99.96, 1536.0)] == [
        "0.00512", "1.00", "100", "1,536",
    ]  # fmt: skip
    assert [quantity(x, "B", digits=1) for x in (1e3, 2e7)] == ["1 kB", "20 MB"]
    assert [tokens(n) for n in (512, 1000, 1024, 65536, 1536)] == [
        "512", "1,000", "1k", "64k", "1,536",
    ]  # fmt: skip
    assert [listing(x) for x in ([], ["a"], ["a", "b", "c"])] == ["", "a", "a, b and c"]


def test_a_contender_keeps_its_color():
    colors = colors_of(CONTENDERS)
    assert len({colors[name] for name in ("sdpa", "lastk", "favor", "peer")}) == 4
    assert colors["layer-dense"] == colors["sdpa"], "each level starts with the same shade"


def test_importing_does_not_load_triton_or_transformers():
    names = ["growth", *(path.stem for path in (ROOT / "bench").glob("report*.py"))]
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); "
    code += "; ".join(f"import attnopt.bench.{name}" for name in names) + "; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"triton", "transformers", "torch", "matplotlib"} & set(done.stdout.split())
