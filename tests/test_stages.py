"""What happens around the steps of a run with features: new draws, gates, nothing to plot."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from tiny_runs import QUIET, read, run, trainer_of, weights

from attnopt import Favor, LastK, convert, mechanisms
from attnopt.distill import distill
from attnopt.report import write_report
from attnopt.runs import load_model
from attnopt.stages import Redraw


def feature_run(teacher, text, folder, steps=4, **options):
    options = {"redraw_every": 2, "save_steps": 1, "save_total_limit": 9, **options}
    config = {0: Favor(4, window=2, window_block=2), 1: Favor(4, norms="constant")}
    return run(teacher, text, folder, steps, config, logging_steps=1, **options)


def test_random_features_are_redrawn_and_resume_bit_for_bit(teacher, text, tmp_path):
    whole = feature_run(teacher, text, tmp_path / "whole", match_steps=1)
    name = "transformer.h.{}.attn.attnopt.projection"
    drawn = {}
    for step in range(1, 5):
        state = weights(whole / "checkpoints" / f"checkpoint-{step}")
        drawn[step] = [state[name.format(layer)] for layer in (0, 1)]
    assert torch.equal(drawn[1][0], drawn[2][0]) and torch.equal(drawn[3][0], drawn[4][0])
    for layer in (0, 1):
        assert not torch.equal(drawn[2][layer], drawn[3][layer])
    assert not torch.equal(drawn[3][0], drawn[3][1])
    for step in (2, 3):  # where it is about to draw, and right after
        folder = tmp_path / f"from-{step}"
        for done in range(1, step + 1):
            copied = f"checkpoints/checkpoint-{done}"
            shutil.copytree(whole / copied, folder / copied)
        feature_run(teacher, text, folder, match_steps=1, resume=True)
        expected, got = weights(whole / "student"), weights(folder / "student")
        assert all(torch.equal(got[key], value) for key, value in expected.items())
    default = 42
    assert torch.equal(drawn_at(teacher, default, 2), drawn[3][0])
    for seed, step in ((7, 2), (default, 4)):
        assert not torch.equal(drawn_at(teacher, seed, step), drawn[3][0])


def drawn_at(teacher, seed, step):
    """Features of layer 0 that a run with this seed draws before a step, whatever else it drew."""
    student = convert(load_model(teacher), Favor(4))
    args = SimpleNamespace(seed=seed, redraw_every=2)
    Redraw().on_step_begin(args, SimpleNamespace(global_step=step), None, model=student)
    return mechanisms(student)[0].projection


def test_gates_are_calibrated_before_the_first_step(teacher, text, tmp_path):
    gates = []
    for rate, eval_tokens in ((1e-30, 160), (1e-30, 32)):
        config = Favor(feature_map="hedgehog", window=2, window_block=2)
        options = {"learning_rate": rate, "max_steps": 1, "seed": 3, "max_eval_tokens": eval_tokens}
        folder = distill(teacher, config, text, tmp_path / str(len(gates)), **QUIET | options)
        state = weights(folder / "student")
        gates.append([state[f"transformer.h.{i}.attn.attnopt.log_gate"] for i in (0, 1)])
    torch.testing.assert_close(gates[0], gates[1], rtol=0, atol=0)
    neutral = convert(load_model(teacher), config)
    for own, found in zip(mechanisms(neutral).values(), gates[0], strict=True):
        assert found.shape == (2,) and (found - own.log_gate).abs().min() > 1e-3


def test_features_have_no_coefficients(teacher, text, tmp_path):
    folder = feature_run(teacher, text, tmp_path / "run", steps=2)
    history = read(folder / "history.json")
    assert all(entry["layers"] == {} for entry in history["coefficients"])
    assert history["labels"] == {} and "l1" not in history["rows"][-1]
    assert read(folder / "masks.json") == {"layers": {}}
    report = write_report([folder], tmp_path).read_text()
    assert "performer M=4 + last 2 / performer M=4" in report
    mixed = convert(load_model(teacher), {0: Favor(4), 1: LastK(window=2)})
    trainer = trainer_of(mixed, tmp_path, text, load_model(teacher), l1_weight=1.0, logging_steps=1)
    trainer.train()
    (log,) = [log for log in trainer.state.log_history if "l1" in log]
    assert log["l1"] == pytest.approx(0.5)  # of the layer that has coefficients
    features = convert(load_model(teacher), Favor(4))
    with pytest.raises(ValueError, match="l1_weight=0.1 has no meaning: .* no coefficients"):
        trainer_of(features, tmp_path, text, load_model(teacher), l1_weight=0.1)
    learned = convert(load_model(teacher), Favor(4, learned=True))
    with pytest.raises(ValueError, match="redraw_every=5 has no meaning: no layer has random"):
        trainer_of(learned, tmp_path, text, load_model(teacher), redraw_every=5)
