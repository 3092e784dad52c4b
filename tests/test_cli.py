"""The command line: instant help, options that reach the functions, mistakes in one line."""

import inspect
import json
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest

from attnopt import (
    NSA,
    Favor,
    First,
    LastK,
    Masks,
    NthLast,
    Routing,
    UserError,
    Window,
    __version__,
    cli,
)

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = ("demo", "pretrain", "distill", "evaluate", "generate", "report", "doctor")


def attnopt(*arguments, status=0):
    command = [sys.executable, "-m", "attnopt", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == status, done.stdout + done.stderr
    return done


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command line in this process; return (status, stdout, stderr)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["attnopt", *map(str, arguments)])
        status = 0
        try:
            cli.main()
        except SystemExit as stop:
            status = stop.code or 0
        return status, *capsys.readouterr()

    return call


@pytest.fixture
def recorded(monkeypatch):
    """Replace attnopt.MODULE.FUNCTION by a recorder that insists on the real signature."""

    def replace(module, function):
        real = getattr(module, function)
        calls = []

        def recorder(*args, **kwargs):
            calls.append(inspect.signature(real).bind(*args, **kwargs).arguments)
            return Path("somewhere")

        monkeypatch.setattr(module, function, recorder)
        return calls

    return replace


def test_help_is_instant_and_complete():
    start = time.perf_counter()
    text = attnopt("--help").stdout
    assert time.perf_counter() - start < 3  # 0.4 s on an idle machine
    assert all(command in text for command in COMMANDS)


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_loads_nothing_heavy(command):
    code = (
        "import sys; from attnopt.cli import main\n"
        f"sys.argv = ['attnopt', *{command.split()}, '--help']\n"
        "try: main()\nexcept SystemExit as stop: assert not stop.code\n"
        "print('LOADED', *sorted({'torch', 'transformers', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1].split() == ["LOADED"], done.stdout + done.stderr


def test_every_option_has_a_meaning_in_the_help():
    import typer

    for command in typer.main.get_command(cli.app).commands.values():
        assert command.help and len(command.help) > 20
        for option in command.params:
            named = option.name in {"width", "layers", "heads", "steps", "temperature"}
            weight = option.name.endswith("_weight")
            assert option.help or named or weight, f"{command.name}: {option.name} has no help"


def test_version(run):
    assert run("--version") == (0, f"attnopt {__version__}\n", "")
    assert attnopt("--version").stdout == f"attnopt {__version__}\n"


def test_distill_passes_everything_on(run, recorded):
    from attnopt import distill as module

    calls = recorded(module, "distill")
    flags = "--window 7 --sinks 2 --per-head --init random --layers 0,2-4 --steps 12 --bf16"
    more = "--resume --max-train-tokens 999 --max-eval-tokens 333 "
    more += "--batch-size 3 --learning-rate 0.01 --train lora --direction reverse --temperature 2"
    data = "--validation-data v.txt --text-column body --block-size 64 --patience 2 --seed 5"
    stages = "--match-steps 8 --match-learning-rate 0.5 --lora-rank 4 --lora-alpha 6"
    weights = "--kl-weight 0.5 --ce-weight 0.25 --l1-weight 0.125 --gradient-accumulation 6"
    words = "distill --model gpt2 --data d.txt --output out".split()
    words += f"{flags} {more} {data} {weights} {stages}".split()
    status, out, _ = run(*words)
    assert status == 0 and "somewhere" in out
    (call,) = calls
    training = call.pop("training")
    assert call["config"] == LastK(window=7, sinks=2, per_head=True, init="random")
    assert call["layers"] == [0, 2, 3, 4]
    assert call["teacher"] == "gpt2" and call["data"] == "d.txt" and call["output"] == Path("out")
    assert call["argv"] == ["attnopt", *words]
    expected = {"block_size": 64, "validation": "v.txt", "text_column": "body", "patience": 2}
    expected |= {"max_train_tokens": 999, "max_eval_tokens": 333}
    assert expected.items() <= call.items() and call["resume"] is True
    assert training.keys() <= {field.name for field in fields(module.DistillationArguments)}
    expected = {"max_steps": 20, "match_steps": 8, "match_learning_rate": 0.5, "redraw_every": None}
    expected |= {"per_device_train_batch_size": 3, "learning_rate": 0.01}
    expected |= {"train_parameters": "lora", "lora_rank": 4, "lora_alpha": 6.0}
    expected |= {"direction": "reverse", "temperature": 2.0, "seed": 5}
    expected |= {"kl_weight": 0.5, "ce_weight": 0.25, "l1_weight": 0.125, "bf16": True}
    expected |= {"gradient_accumulation_steps": 6}
    assert expected.items() <= training.items()


def test_distill_without_options_is_the_studys_default(run, recorded):
    from attnopt import distill as module

    calls = recorded(module, "distill")
    run("distill", "--model", "gpt2", "--data", "demo", "--output", "out")
    assert calls[0]["config"] == LastK(window=5)
    assert calls[0].get("layers") is None
    assert calls[0]["training"]["match_steps"] == 0
    assert calls[0]["training"]["max_steps"] == module.DEFAULTS["max_steps"]
    assert calls[0]["training"]["learning_rate"] == module.DEFAULTS["learning_rate"]


def test_masks_are_read(run, recorded):
    from attnopt import distill as module

    calls = recorded(module, "distill")
    common = ("distill", "--model", "m", "--data", "demo", "--output", "o", "--attention", "masks")
    run(*common)
    assert calls[-1]["config"] == Masks()
    run(*common, "--mask", "nth:3", "--mask", "window:8", "--mask", "first:2")
    assert calls[-1]["config"] == Masks(candidates=(NthLast(3), Window(8), First(2)))


FEATURES = "--features 64 --window 33 --window-block 16 --stabilizer static"


@pytest.mark.parametrize(
    ("flags", "config"),
    [
        ("performer", Favor()),
        (f"performer {FEATURES} --norms constant --redraw-every 7",
         Favor(64, window=33, window_block=16, stabilizer="static", norms="constant")),
        ("kerformer", Favor(learned=True)),
        (f"kerformer {FEATURES} --norms constant",
         Favor(64, window=33, window_block=16, stabilizer="static", norms="constant",
               learned=True)),
        ("hedgehog", Favor(feature_map="hedgehog")),
        (f"hedgehog {FEATURES}",
         Favor(64, "hedgehog", window=33, window_block=16, stabilizer="static")),
        ("based", Favor(feature_map="taylor", window=33)),
        ("based --window 0", Favor(feature_map="taylor")),
        ("based --window 65 --window-block 8",
         Favor(feature_map="taylor", window=65, window_block=8)),
    ],
)  # fmt: skip
def test_feature_attention_is_read(run, recorded, flags, config):
    from attnopt import distill as module

    calls = recorded(module, "distill")
    words = f"distill --model m --data demo --output o --attention {flags}".split()
    status, _, err = run(*words)
    assert status == 0, err
    assert calls[0]["config"] == config
    assert calls[0]["training"]["redraw_every"] == (7 if "redraw" in flags else None)


@pytest.mark.parametrize(
    ("flags", "config"),
    [
        ("", NSA()),
        ("--select-block 16 --num-selected 2 --window 33 --sink-blocks 1 --compression weighted",
         NSA(select_block=16, num_selected=2, window=33, sink_blocks=1, compression="weighted")),
        ("--combine merged --num-selected 0", NSA(num_selected=0)),
        ("--combine gates", NSA("gates")),
        ("--combine gates --select-block 64 --compress-block 32 --compress-stride 16 "
         "--num-selected 16 --window 512 --sink-blocks 0 --local-blocks 1 --compression mlp",
         NSA("gates", 64, 32, 16, 16, 512, 0, 1, "mlp")),
    ],
)  # fmt: skip
def test_sparse_attention_is_read(run, recorded, flags, config):
    from attnopt import distill as module

    calls = recorded(module, "distill")
    status, _, err = run(*DISTILL, "--attention", "nsa", *flags.split())
    assert status == 0, err
    assert calls[0]["config"] == config


@pytest.mark.parametrize(
    ("flags", "config"),
    [("", Routing()), ("--clusters 16 --window 32", Routing(num_clusters=16, window=32))],
)
def test_routing_is_read(run, recorded, flags, config):
    from attnopt import distill as module

    calls = recorded(module, "distill")
    status, _, err = run(*DISTILL, "--attention", "routing", *flags.split())
    assert status == 0, err
    assert calls[0]["config"] == config


def test_pretrain_passes_everything_on(run, recorded):
    from attnopt import pretrain as module

    calls = recorded(module, "pretrain")
    shape = "--layers 3 --width 96 --heads 6 --context 128 --steps 9 --tokenizer t --batch-size 2"
    run("pretrain", "--data", "d.txt", "--output", "out", *shape.split(), "--learning-rate", "0.1")
    training = calls[0].pop("training")
    expected = {"layers": 3, "width": 96, "heads": 6, "context": 128, "steps": 9, "tokenizer": "t"}
    assert expected.items() <= calls[0].items()
    assert training["per_device_train_batch_size"] == 2 and training["learning_rate"] == 0.1


def test_evaluate_prints_the_comparison(run, monkeypatch, write_run, tmp_path):
    from attnopt import evaluate as module

    folder, calls = write_run(tmp_path / "a"), []
    evaluation = json.loads((folder / "evaluation.json").read_text())
    monkeypatch.setattr(module, "evaluate", lambda *a, **k: calls.append((a, k)) or evaluation)
    flags = "--data d.txt --max-tokens 77 --block-size 12 --stride 6 --text"
    status, out, _ = run("evaluate", folder, *flags.split())
    assert status == 0
    assert calls[0][0] == (folder,)
    expected = {"data": "d.txt", "max_tokens": 77, "block_size": 12, "stride": 6, "text": True}
    assert expected.items() <= calls[0][1].items()
    for words in ("last-3", "zero-shot", "trained", "1.050", "95.2 %", "1.62 nats/token"):
        assert words in out, out


def test_generate_passes_everything_on(run, monkeypatch):
    from attnopt import samples as module

    calls, made = [], [{"prompt": "p", "teacher": "t", "student": "s"}]
    monkeypatch.setattr(module, "sample_run", lambda *a, **k: calls.append((a, k)) or made)
    flags = "--compare --max-new-tokens 9 --temperature 0.5 --top-k 3 --seed 4"
    status, out, _ = run("generate", "x", *flags.split(), "--prompt", "p", "--prompt", "q")
    settings = {"max_new_tokens": 9, "temperature": 0.5, "top_k": 3, "seed": 4, "compare": True}
    assert calls == [((Path("x"), ["p", "q"]), settings)]
    assert status == 0 and "--- teacher\nt" in out and "--- student\ns" in out


DISTILL = ("distill", "--model", "m", "--data", "demo", "--output", "o")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*DISTILL, "--window", "0"), "window must be an integer >= 1; got 0"),
        ((*DISTILL, "--mask", "nth:1"), "--mask has no meaning with --attention lastk"),
        ((*DISTILL, "--attention", "masks", "--window", "3"), "--window has no meaning"),
        ((*DISTILL, "--attention", "masks", "--window", "0"), "--window has no meaning"),
        ((*DISTILL, "--features", "8"), "--features has no meaning with --attention lastk"),
        ((*DISTILL, "--redraw-every", "8"), "--redraw-every has no meaning with --attention lastk"),
        ((*DISTILL, "--attention", "performer", "--per-head"), "--per-head has no meaning"),
        ((*DISTILL, "--attention", "performer", "--init", "zeros"), "--init has no meaning"),
        ((*DISTILL, "--attention", "performer", "--sinks", "1"), "--sinks has no meaning"),
        ((*DISTILL, "--attention", "performer", "--window-block", "8"), "without --window"),
        ((*DISTILL, "--attention", "kerformer", "--redraw-every", "8"), "takes --features and"),
        ((*DISTILL, "--attention", "hedgehog", "--norms", "chi"), "--norms has no meaning"),
        ((*DISTILL, "--attention", "hedgehog", "--features", "7"), "must be even"),
        ((*DISTILL, "--attention", "based", "--features", "8"), "--features has no meaning"),
        ((*DISTILL, "--attention", "based", "--stabilizer", "static"), "--stabilizer has no"),
        ((*DISTILL, "--select-block", "8"), "--select-block has no meaning with --attention lastk"),
        ((*DISTILL, "--attention", "nsa", "--sinks", "1"), "--sinks has no meaning"),
        ((*DISTILL, "--attention", "nsa", "--window", "0"), "window must be an integer >= 1; got"),
        ((*DISTILL, "--attention", "nsa", "--local-blocks", "1"), "merged' has no local_blocks"),
        ((*DISTILL, "--attention", "nsa", "--compress-stride", "8"), "must be select_block, 32"),
        ((*DISTILL, "--attention", "nsa", "--combine", "gates", "--num-selected", "2"),
         "num_selected counts 3 forced blocks; got 2"),
        ((*DISTILL, "--clusters", "8"), "--clusters has no meaning with --attention lastk"),
        ((*DISTILL, "--attention", "routing", "--clusters", "0"), "num_clusters must be"),
        ((*DISTILL, "--steps", "0"), "--steps and --match-steps are both 0"),
        ((*DISTILL, "--attention", "masks", "--mask", "last:3"), "--mask takes nth:N"),
        ((*DISTILL, "--layers", "1,x"), "--layers takes numbers and ranges"),
        (("report", "nowhere"), "nowhere is not a run folder"),
        (("evaluate", "nowhere"), "nowhere is not a run folder"),
        (("generate", "nowhere"), "nowhere is not a run folder"),
        (("demo", "--output", "/proc/nowhere"), "cannot write to the output folder /proc/nowhere"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(run, arguments, message):
    status, out, err = run(*arguments)
    assert status == 2
    assert err.startswith("error: ") and message in err
    assert err.count("\n") == 1 and out == ""


@pytest.mark.parametrize("arguments", [("distil",), ("distill", "--model", "m"), ("report",)])
def test_usage_errors_exit_with_two(run, arguments):
    status, _, err = run(*arguments)
    assert status == 2
    assert "Traceback" not in err


def test_mistakes_show_no_traceback_but_on_request():
    done = attnopt("report", "nowhere", status=2)
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    done = attnopt("report", "nowhere", "--debug", status=1)
    assert "Traceback" in done.stderr and "UserError" in done.stderr


def test_our_own_bugs_keep_their_traceback(run, monkeypatch):
    import attnopt.report

    def broken(*args):
        return int("x")  # a ValueError that no check of this package raised

    monkeypatch.setattr(attnopt.report, "write_report", broken)
    with pytest.raises(ValueError, match="invalid literal"):
        run("report", "x")


def test_user_errors_from_below_are_one_line(run, monkeypatch):
    import attnopt.report

    def refuse(*args):
        raise UserError("the disk is full")

    monkeypatch.setattr(attnopt.report, "write_report", refuse)
    assert run("report", "x") == (2, "", "error: the disk is full\n")
