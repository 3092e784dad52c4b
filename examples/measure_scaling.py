"""Scaling of attention on a CPU: times that stand behind a check of every number.

    python measure_scaling.py

Times last-k attention, FAVOR+ and NSA against PyTorch's fused softmax attention, forward and
backward, at lengths that double until the time is spent; fits how they grow; finds from which
length on each is ahead; and writes a page with plots and all numbers. One minute. `attnopt bench`
does the same from the command line, on a GPU too.
"""

import argparse
from pathlib import Path

from attnopt.bench import growth, scheduler
from attnopt.bench.report import print_summary, write_report

OURS = ("lastk-5", "favor-64", "nsa-merged")


def main() -> None:
    """Measure, print, and write the page."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=60.0, help="of the whole measurement")
    parser.add_argument("--longest", type=int, help="number of tokens to stop at")
    parser.add_argument("--output", type=Path, default=Path("scaling"))
    arguments = parser.parse_args()

    results = arguments.output / "results.json"
    arguments.output.mkdir(exist_ok=True)
    record = scheduler.run(
        results, budget=arguments.seconds, command="measure_scaling.py", levels=["op"],
        phases=["bwd"], only=OURS, longest=arguments.longest,
    )  # fmt: skip
    print_summary(record)

    # The record is plain data: every cell has its times, its memory and the errors of its check.
    for name in OURS:
        cells = [c for c in record["cells"] if c["contender"] == name and growth.is_reported(c)]
        for cell in cells:
            worst = max(error for error in cell["errors"].values() if error is not None)
            milliseconds = 1e3 * growth.median(cell)
            print(f"{name}: N = {cell['N']}, {milliseconds:.1f} ms, largest error {worst:.0e}")
    print("page:", write_report([results], arguments.output / "report.html"))


if __name__ == "__main__":
    main()
