"""The command line. Commands import what they need when they run, so that help is instant."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from attnopt import __version__, cli_bench
from attnopt import cli_attention as options
from attnopt.errors import UserError

app = typer.Typer(
    help="Efficient attention for pretrained models: convert, distill, and see what it cost.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

DATA_HELP = "demo, wikitext-2, wikitext-103, a .txt, .jsonl or .parquet file, or a Hub id."
TRAIN_HELP = (
    f"{DATA_HELP} Or text that the teacher writes: teacher:2M, or teacher:2M:wikitext-2 for texts "
    "that begin like those; temperature=, top_k=, top_p= and seed= go before the last colon."
)
Data = Annotated[str, typer.Option(help=DATA_HELP)]
Validation = Annotated[
    str | None, typer.Option("--validation-data", help="File used whole for validation.")
]
TextColumn = Annotated[str | None, typer.Option(help="Column of text, where there are several.")]
Tokenizer = Annotated[
    str | None, typer.Option(help="Folder or Hub id.", show_default="the model's")
]
BlockSize = Annotated[
    int | None,
    typer.Option(min=2, help="Tokens per sequence.", show_default="the context, to 1024"),
]
MaxTrainTokens = Annotated[
    int | None, typer.Option(min=1, help="Train on a random part.", show_default="all")
]
MaxEvalTokens = Annotated[int, typer.Option(min=1, help="Of each evaluation while training.")]
Output = Annotated[Path, typer.Option(help="Folder to write.")]
Steps = Annotated[int, typer.Option(min=1, help="Optimizer steps.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Blocks per step and device.")]
Patience = Annotated[
    int | None, typer.Option(min=1, help="Stop after so many evaluations without gain.")
]
Seed = Annotated[int, typer.Option(help="Of everything random.")]
Packed = Annotated[
    bool, typer.Option("--packed", help="Let no token see another document of its block.")
]
Bf16 = Annotated[bool, typer.Option("--bf16", help="Train under bfloat16 autocast.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")]
RunFolder = Annotated[Path, typer.Argument(help="Folder written by `attnopt distill`.")]
OBJECTIVE = "Objective"

app.add_typer(cli_bench.app, name="bench")


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    """`main` handles both before any command is looked up."""


@app.command()
def demo(
    output: Output = Path("demo-report"),
    retrain: Annotated[bool, typer.Option("--retrain", help="Train the teacher anew.")] = False,
) -> None:
    """Train a small teacher, replace its attention eight times, distill, compare. On a CPU.

    Needs no network and no GPU: the text is the documentation inside Python's standard library.
    """
    from attnopt.demo import run_demo

    run_demo(output, retrain=retrain)


@app.command()
def pretrain(
    data: Data,
    output: Output,
    tokenizer: Annotated[str, typer.Option(help="`bytes`, or a folder or Hub id.")] = "bytes",
    layers: Annotated[int, typer.Option(min=1)] = 4,
    width: Annotated[int, typer.Option(min=1)] = 128,
    heads: Annotated[int, typer.Option(min=1)] = 4,
    context: Annotated[int, typer.Option(min=2, help="Tokens the model sees.")] = 256,
    steps: Steps = 2000,
    batch_size: BatchSize = 4,
    learning_rate: Annotated[float, typer.Option(min=0, help="Until the last half.")] = 2e-3,
    validation_data: Validation = None,
    text_column: TextColumn = None,
    max_eval_tokens: MaxEvalTokens = 65_536,
    packed: Packed = False,
    seed: Seed = 42,
    bf16: Bf16 = False,
    resume: Resume = False,
) -> None:
    """Train a small GPT-2 from scratch: a teacher for where no pretrained model can be had."""
    from attnopt import pretrain as module

    folder = module.pretrain(
        data,
        output,
        tokenizer=tokenizer,
        layers=layers,
        width=width,
        heads=heads,
        context=context,
        steps=steps,
        text_column=text_column,
        validation=validation_data,
        max_eval_tokens=max_eval_tokens,
        packed=packed,
        resume=resume,
        argv=_argv(),
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
        bf16=bf16,
    )
    typer.echo(f"model: {folder}")


@app.command()
def distill(
    model: Annotated[str, typer.Option(help="Teacher: a folder or Hub id, such as gpt2.")],
    data: Annotated[str, typer.Option(help=TRAIN_HELP)],
    output: Output,
    attention: options.Attention = "lastk",
    window: options.Window = None,
    sinks: options.Sinks = None,
    mask: options.Mask = None,
    per_head: options.PerHead = False,
    init: options.Init = None,
    features: options.Features = None,
    window_block: options.WindowBlock = None,
    stabilizer: options.Stabilizer = None,
    norms: options.Norms = None,
    redraw_every: options.RedrawEvery = None,
    combine: options.Combine = None,
    select_block: options.SelectBlock = None,
    compress_block: options.CompressBlock = None,
    compress_stride: options.CompressStride = None,
    num_selected: options.NumSelected = None,
    sink_blocks: options.SinkBlocks = None,
    local_blocks: options.LocalBlocks = None,
    compression: options.Compression = None,
    clusters: options.Clusters = None,
    layers: options.Layers = None,
    train: Annotated[
        Literal["coefficients", "lora", "attention", "all"],
        typer.Option(rich_help_panel=OBJECTIVE, help="Which parameters learn."),
    ] = "attention",
    lora_rank: Annotated[
        int | None, typer.Option(min=1, help="Of adapters (--train lora).", show_default="8")
    ] = None,
    lora_alpha: Annotated[
        float | None,
        typer.Option(min=0, help="Their scale is alpha / rank.", show_default="twice the rank"),
    ] = None,
    direction: Annotated[
        Literal["forward", "reverse"],
        typer.Option(rich_help_panel=OBJECTIVE, help="KL(teacher||student) or the reverse."),
    ] = "forward",
    temperature: Annotated[float, typer.Option(rich_help_panel=OBJECTIVE)] = 1.0,
    kl_weight: Annotated[float, typer.Option(rich_help_panel=OBJECTIVE)] = 1.0,
    ce_weight: Annotated[float, typer.Option(rich_help_panel=OBJECTIVE)] = 0.0,
    l1_weight: Annotated[float, typer.Option(rich_help_panel=OBJECTIVE)] = 0.0,
    match_steps: Annotated[
        int, typer.Option(min=0, help="Steps before --steps that match each layer's attention.")
    ] = 0,
    match_learning_rate: Annotated[
        float | None, typer.Option(min=0, help="Of those steps.", show_default="the same")
    ] = None,
    steps: Annotated[int, typer.Option(min=0, help="Optimizer steps on the objective.")] = 1000,
    batch_size: BatchSize = 4,
    gradient_accumulation: Annotated[int, typer.Option(min=1, help="Batches per step.")] = 1,
    learning_rate: Annotated[float, typer.Option(min=0, help="Peak of the cosine.")] = 3e-4,
    coefficient_learning_rate: Annotated[
        float | None, typer.Option(min=0, help="Of coefficients, features and gates, if another.")
    ] = None,
    patience: Patience = None,
    block_size: BlockSize = None,
    tokenizer: Tokenizer = None,
    validation_data: Validation = None,
    text_column: TextColumn = None,
    max_train_tokens: MaxTrainTokens = None,
    max_eval_tokens: MaxEvalTokens = 65_536,
    packed: Packed = False,
    seed: Seed = 42,
    bf16: Bf16 = False,
    resume: Resume = False,
) -> None:
    """Replace a model's attention and train it to give the original's answers.

    Writes the student, checkpoints, curves and masks to the output folder, and run.json with this
    command. `attnopt evaluate`, `generate --compare` and `report` go on from there.
    """
    config = options.build_config(attention, options.of_attention(locals()))
    if steps + match_steps == 0:
        raise UserError("nothing to train: --steps and --match-steps are both 0")
    from attnopt import distill as module

    folder = module.distill(
        model,
        config,
        data,
        output,
        layers=None if layers is None else options.layer_indices(layers),
        tokenizer=tokenizer,
        block_size=block_size,
        text_column=text_column,
        validation=validation_data,
        max_train_tokens=max_train_tokens,
        max_eval_tokens=max_eval_tokens,
        packed=packed,
        patience=patience,
        resume=resume,
        argv=_argv(),
        max_steps=match_steps + steps,
        match_steps=match_steps,
        match_learning_rate=match_learning_rate,
        redraw_every=redraw_every,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=gradient_accumulation,
        learning_rate=learning_rate,
        coefficient_learning_rate=coefficient_learning_rate,
        train_parameters=train,
        lora_rank=lora_rank,
        lora_alpha=lora_alpha,
        direction=direction,
        temperature=temperature,
        kl_weight=kl_weight,
        ce_weight=ce_weight,
        l1_weight=l1_weight,
        seed=seed,
        bf16=bf16,
    )
    typer.echo(f"run: {folder}")


@app.command()
def evaluate(
    run: RunFolder,
    data: Annotated[str | None, typer.Option(help=DATA_HELP, show_default="the run's")] = None,
    teacher: Annotated[str | None, typer.Option(help="For a model that is no run.")] = None,
    text_column: TextColumn = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Use a random part of the text.", show_default="all")
    ] = None,
    block_size: Annotated[
        int | None, typer.Option(min=2, help="Tokens per sequence.", show_default="the run's")
    ] = None,
    stride: Annotated[
        int | None, typer.Option(min=1, help="Also perplexity of windows so far apart.")
    ] = None,
    text: Annotated[bool, typer.Option("--text", help="Also compare what they write.")] = False,
) -> None:
    """Compare teacher, converted teacher and student on held-out text, beside the controls.

    Writes evaluation.json to the run's folder.
    """
    from attnopt import evaluate as module
    from attnopt.report.console import print_comparison
    from attnopt.report.runs import label_of

    result = module.evaluate(
        run,
        data=data,
        teacher=teacher,
        text_column=text_column,
        block_size=block_size,
        max_tokens=max_tokens,
        text=text,
        stride=stride,
    )
    print_comparison([(label_of(run), result)])


@app.command()
def generate(
    run: RunFolder,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Repeat for more.", show_default="held-out text")
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Beside the teacher, with time and memory.")
    ] = False,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Length.", show_default="a quarter of the context, to 100"),
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.01)] = 0.7,
    top_k: Annotated[int, typer.Option(min=1, help="Sample from the k most likely.")] = 50,
    seed: Seed = 0,
) -> None:
    """Continue prompts with a run's student; with --compare beside its teacher, same seed.

    Comparing writes generation.json to the run's folder, with the time and memory of both.
    """
    from attnopt.samples import sample_run

    samples = sample_run(
        run,
        prompt or (),
        compare=compare,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        seed=seed,
    )
    for sample in samples:
        for name, text in sample.items():
            typer.echo(f"\n--- {name}\n{text}")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders written by `attnopt distill`.")],
    output: Annotated[
        Path | None, typer.Option(help="Page or folder.", show_default="the first run's folder")
    ] = None,
) -> None:
    """Write one HTML page that compares runs, and its numbers as JSON beside it."""
    from attnopt.report import write_report

    typer.echo(f"report: {write_report(runs, output or runs[0])}")


@app.command()
def doctor(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the findings.")] = None,
) -> None:
    """Say what works on this machine and why the rest does not: packages, GPU, ops, Hub, disk.

    Runs every op against its definition. Exits with status 1 where something is broken.
    """
    from dataclasses import asdict

    from attnopt.checkpoints import write_json
    from attnopt.doctor import examine, show

    findings = examine()
    show(findings)
    if json_file is not None:
        write_json(json_file, [asdict(finding) for finding in findings])
    raise typer.Exit(any(finding.state == "problem" for finding in findings))


def main() -> None:
    """Run the command line; a user's mistake is one line on stderr and exit status 2."""
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    if arguments[:1] == ["--version"]:
        print(f"attnopt {__version__}")
        return
    try:
        app(arguments)
    except Exception as error:
        if len(arguments) < len(sys.argv) - 1 or not _is_mistake(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _is_mistake(error: Exception) -> bool:
    """UserError, and the ValueErrors with which this package refuses an argument."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    ours = trace is not None and trace.tb_frame.f_globals["__name__"].startswith("attnopt.")
    return isinstance(error, UserError) or (isinstance(error, ValueError) and ours)


def _argv() -> list[str]:
    return ["attnopt", *(a for a in sys.argv[1:] if a != "--debug")]
