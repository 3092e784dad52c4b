"""The command `attnopt bench`: measure, report, and judge kernels without a GPU."""

import enum
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from attnopt.errors import UserError

app = typer.Typer(
    help="Measure attention on this machine, and judge its kernels with or without a GPU.",
    invoke_without_command=True,
    pretty_exceptions_enable=False,
)


class Op(str, enum.Enum):
    """Mechanisms that have kernels."""

    LASTK, FAVOR, NSA = "lastk", "favor", "nsa"


class Arch(str, enum.Enum):
    """Architectures that kernels are compiled for."""

    SM_80, SM_90, SM_100 = "sm_80", "sm_90", "sm_100"


class Level(str, enum.Enum):
    """How much is around the attention that is measured."""

    OP, LAYER, BLOCK, MODEL = "op", "layer", "block", "model"


class Device(str, enum.Enum):
    """Where to measure."""

    CPU, CUDA = "cpu", "cuda"


class Phase(str, enum.Enum):
    """What is measured: forward, forward and backward, a step of decoding."""

    FWD, BWD, DECODE = "fwd", "bwd", "decode"


Budget = Annotated[str, typer.Option(help="Time of the whole run: 90s, 5m, 1h.")]
Ops = Annotated[
    list[Op] | None,
    typer.Option(help="Mechanism; repeat for more.", show_default="all"),
]
Json = Annotated[Path | None, typer.Option("--json", help="Write the record there.")]


@app.callback()
def bench(
    context: typer.Context,
    budget: Budget = "5m",
    output: Annotated[Path, typer.Option(help="Folder for results.json and report.html.")] = Path(
        "bench-report"
    ),
    level: Annotated[
        list[Level] | None,
        typer.Option(help="Attention alone, with projections, in GPT-2.", show_default="all"),
    ] = None,
    phase: Annotated[
        list[Phase] | None,
        typer.Option(help="Forward, forward + backward, a step of decoding.", show_default="all"),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="A contender's name; repeat for more.")
    ] = None,
    longest: Annotated[
        int | None, typer.Option(
            min=256, help="Most tokens; lengths are 256, 512, ...", show_default="as time allows"
        ),
    ] = None,
    device: Annotated[
        Device | None, typer.Option(help="Where to measure.", show_default="a GPU if there is one")
    ] = None,
) -> None:
    """Measure time and memory of every mechanism against dense attention and other libraries.

    Lengths double as far as the time budget and memory allow: from 256 tokens on a CPU, where one
    thread computes in fp32; from 512 on a GPU, attention alone in 16 bit, at three batch sizes.
    Every timed call is checked against its float64 definition at the same size. Peers take part
    where they are installed: pip install "attnopt[peers]".
    """
    if context.invoked_subcommand is not None:
        return
    import torch

    from attnopt.bench import gpu_check, report, scheduler
    from attnopt.bench.contenders import LEVELS, PHASES

    results, on_gpu = output / "results.json", torch.cuda.is_available()
    if device == Device.CUDA or (device is None and on_gpu):
        if level or phase or only or longest:
            raise UserError("--level, --phase, --only and --longest need --device cpu")
        record = gpu_check.run(results, budget=seconds(budget), kind="scaling")
    else:
        record = scheduler.run(
            results,
            budget=seconds(budget),
            command=command(),
            levels=values(level) or LEVELS,
            phases=values(phase) or PHASES,
            only=only or (),
            longest=longest,
        )
    if not any(cell["status"] == "ok" for cell in record["cells"]):
        raise UserError(f"nothing was measured within {budget}; {results} says why for each cell")
    report.print_summary(record)
    typer.echo(f"results: {results}")
    page = report.write_report([results], output / "report.html")
    typer.echo(f"report: {page}")
    if record.get("interrupted"):
        raise typer.Exit(130)


@app.command("report")
def report_command(
    files: Annotated[list[Path], typer.Argument(help="Results of measurements or predictions.")],
    output: Annotated[
        Path | None, typer.Option(help="Page or folder.", show_default="beside the first file")
    ] = None,
) -> None:
    """Write one HTML page from results: plots, crossover lengths, every number, what is missing."""
    from attnopt.bench.report import write_report

    typer.echo(f"report: {write_report(files, output or files[0].with_suffix('.html'))}")


@app.command()
def kernels(
    op: Ops = None,
    arch: Annotated[
        list[Arch] | None,
        typer.Option(help="Architecture; repeat for more.", show_default="all"),
    ] = None,
    json_path: Json = None,
) -> None:
    """Compile every kernel for GPUs that are not here: registers, spills, tensor cores, occupancy.

    Exits with status 1 on spills and on matrix products without tensor cores.
    """
    from attnopt.bench.instruments import builds

    archs = values(arch) or builds.DEFAULT_ARCHS
    _judge(builds, json_path, ops=values(op), archs=archs)


@app.command()
def traffic(
    op: Ops = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="Bytes of every tensor too.")] = False,
    json_path: Json = None,
) -> None:
    """Count the bytes and operations of every kernel, and hold them against the minimum.

    Exits with status 1 where an op is over its budget.
    """
    interpreted()
    from attnopt.bench.instruments import traffic as module

    _judge(module, json_path, ops=values(op), show_options={"tensors": tensors})


@app.command()
def safety(op: Ops = None, json_path: Json = None) -> None:
    """Look for accesses out of bounds, reads of unwritten memory, races, dependence on order.

    Exits with status 1 on any finding.
    """
    interpreted()
    from attnopt.bench.instruments import safety as module

    _judge(module, json_path, ops=values(op))


@app.command()
def roofline(
    counted: Annotated[
        Path | None,
        typer.Argument(help="What `traffic --json` wrote.", show_default="counted now"),
    ] = None,
    json_path: Json = None,
) -> None:
    """Predict the time of every op on T4, A100, H100 and H200 from counted bytes and FLOPs."""
    import json

    from attnopt.bench import machine
    from attnopt.bench import roofline as module

    if counted is None:
        interpreted()
        from attnopt.bench.instruments import traffic as counter

        record = counter.examine()
    else:
        try:
            record = json.loads(counted.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {counted}: {error}") from error
    predicted = machine.record("roofline", command(), "cpu") | module.predict(record)
    predicted["counted"] = {key: record.get(key) for key in ("command", "commit", "versions")}
    module.show(predicted)
    _write(predicted, json_path)


@app.command("gpu-check")
def gpu_check(
    budget: Budget = "9m",
    output: Annotated[Path, typer.Option(help="JSON file to write.")] = Path("gpu-check.json"),
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="On the CPU, in Triton's interpreter, tiny sizes.")
    ] = False,
) -> None:
    """Check every kernel on this machine's GPU against float64, then measure, into one JSON file.

    Exits with status 1 where a kernel is wrong. Needs nothing but torch and triton.
    """
    if rehearse:
        interpreted()
    from attnopt.bench import gpu_check as module
    from attnopt.bench.report import print_summary

    record = module.run(output, budget=seconds(budget), rehearse=rehearse)
    print_summary(record)
    typer.echo(f"results: {output}")
    _exit(record)


def seconds(text: str) -> float:
    """Seconds of a length of time such as 90s, 5m, 1h or a number of seconds.

    Raises UserError for anything else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip())
    if match is None or float(match[1]) <= 0:
        raise UserError(f"a time is a number with s, m or h, such as 90s or 5m; got {text!r}")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


def values(chosen: Sequence[enum.Enum] | None) -> list[str] | None:
    """What was chosen as strings, None for everything."""
    return [one.value for one in chosen] if chosen else None


def interpreted() -> None:
    """Let Triton run in its interpreter; must come before Triton is imported."""
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise UserError("Triton is loaded already: set TRITON_INTERPRET=1 before the start")
    os.environ["TRITON_INTERPRET"] = "1"


def command() -> str:
    """The command line that runs, as a user would type it."""
    import shlex

    return shlex.join(["attnopt", *(a for a in sys.argv[1:] if a != "--debug")])


def _judge(
    module: Any, path: Path | None, *, show_options: dict[str, Any] | None = None, **options: Any
) -> None:
    """Examine, show, write, and exit with 1 on failures."""
    from attnopt.bench import machine

    examine: Callable[..., dict[str, Any]] = module.examine
    record = machine.record("instrument", command(), "cpu") | examine(**options)
    module.show(record, **(show_options or {}))
    _write(record, path)
    _exit(record)


def _write(record: dict[str, Any], path: Path | None) -> None:
    if path is not None:
        from attnopt.bench.files import write

        write(path, record)
        typer.echo(f"results: {path}")


def _exit(record: dict[str, Any]) -> None:
    if record.get("failures"):
        raise typer.Exit(1)
