"""Training a small GPT-2 from scratch."""

import json

import pytest
from squares import write_squares
from transformers import GPT2LMHeadModel

from attnopt.errors import UserError
from attnopt.pretrain import pretrain
from attnopt.runs import check_fits, load_model, load_tokenizer

CONTEXT = 16
QUIET = {"disable_tqdm": True, "per_device_train_batch_size": 2, "learning_rate": 2e-3}


@pytest.fixture
def text(tmp_path):
    return write_squares(tmp_path / "text.txt", 300)


def test_pretraining_learns_and_saves_a_model_like_any_other(text, tmp_path):
    shape = {"layers": 1, "width": 16, "heads": 2, "context": CONTEXT}
    options = {"steps": 8, "max_eval_tokens": 160, "warmup_steps": 1, "logging_steps": 1}
    folder = pretrain(text, tmp_path / "model", **shape, **QUIET, **options)
    rows = json.loads((folder / "history.json").read_text())["rows"]
    # warm-up, constant, then linear to zero over the second half
    rates = [row["learning_rate"] / 2e-3 for row in rows]
    assert rates == pytest.approx([0, 1, 1, 1, 1, 0.75, 0.5, 0.25], abs=1e-6)
    evaluated = [row for row in rows if "eval_ce" in row]
    assert evaluated[-1]["step"] == 8 and "eval_kl" not in evaluated[-1]
    assert evaluated[-1]["eval_ce"] < evaluated[0]["eval_ce"]
    assert json.loads((folder / "pretrain.json").read_text())["training"]["max_steps"] == 8
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    assert check_fits(model, tokenizer, None) == CONTEXT
    assert type(model) is GPT2LMHeadModel and model.config.n_layer == 1
    with pytest.raises(UserError, match="already holds a model"):
        pretrain(text, folder)
    with pytest.raises(UserError, match="--heads must divide --width; got 3 heads"):
        pretrain(text, tmp_path / "other", width=16, heads=3)
