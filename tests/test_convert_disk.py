"""Converted models on disk: saved, loaded in every way, and completed where weights are missing."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import tiny_family
from small_gpt2 import MIXED, tiny, tokens
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
)

from attnopt import LastK, convert, from_pretrained, mechanisms, revert
from attnopt.convert.families import FAMILIES


@pytest.fixture
def saved(tmp_path):
    model = convert(tiny(), MIXED)
    model.save_pretrained(tmp_path / "student")
    return model, tmp_path / "student"


def test_another_process_generates_the_same(saved):
    model, folder = saved
    expected = model.generate(tokens(1), max_new_tokens=20, do_sample=False)
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
import torch
from attnopt import from_pretrained
model = from_pretrained({str(folder)!r})
x = torch.tensor({tokens(1).tolist()!r})
print(model.generate(x, max_new_tokens=20, do_sample=False).tolist())
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == str(expected.tolist())


def test_loads_by_class_and_by_auto(saved):
    model, folder = saved
    x = tokens()
    for load in (
        from_pretrained,
        AutoModelForCausalLM.from_pretrained,
        type(model).from_pretrained,
    ):
        loaded = load(folder)
        assert type(loaded) is type(model) and not loaded.training
        assert loaded.config.model_type == "attnopt_gpt2"
        assert loaded.config._attn_implementation == "attnopt"
        assert torch.equal(loaded(x).logits, model(x).logits)
    loaded = revert(loaded)
    assert type(loaded) is GPT2LMHeadModel and loaded.config.architectures == ["GPT2LMHeadModel"]
    assert torch.equal(loaded(x).logits, tiny()(x).logits)


def test_loads_in_bfloat16_with_full_coefficients(saved):
    model, folder = saved
    loaded = from_pretrained(folder, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    for index, mechanism in mechanisms(loaded).items():
        assert torch.equal(mechanism.alpha, mechanisms(model)[index].alpha)
    x = tokens()
    rounded = copy.deepcopy(model).to(torch.bfloat16)
    assert torch.equal(loaded(x).logits, rounded(x).logits)
    assert (loaded(x).logits - model(x).logits).abs().max() < 0.2 * model(x).logits.abs().max()
    loaded.save_pretrained(folder)
    again = from_pretrained(folder)
    assert again.dtype == torch.bfloat16
    assert torch.equal(mechanisms(again)[0].alpha, mechanisms(model)[0].alpha)


@pytest.mark.parametrize("init", ["zeros", "random"])
def test_missing_coefficients_are_initialized(tmp_path, init):
    model = convert(tiny(), LastK(4, sinks=1, init=init))
    kept = {name: tensor for name, tensor in model.state_dict().items() if "attnopt" not in name}
    model.save_pretrained(tmp_path, state_dict=kept)
    torch.manual_seed(5)
    loaded = from_pretrained(tmp_path)
    torch.manual_seed(5)
    for mechanism in mechanisms(loaded).values():
        for alpha in (mechanism.alpha, mechanism.sink_alpha):
            expected = torch.randn(alpha.shape) if init == "random" else torch.zeros(alpha.shape)
            assert torch.equal(alpha, expected)


def test_a_fresh_model_of_the_converted_class(saved):
    model, _ = saved
    fresh = type(model)(model.config)
    assert list(mechanisms(fresh)) == [0, 2]
    assert fresh(tokens()).logits.isfinite().all()
    with pytest.raises(ValueError, match="needs a config with the entry 'attnopt'"):
        type(model)(GPT2Config())


def test_set_attn_implementation_switches(saved):
    _, folder = saved
    x = tokens()
    model = from_pretrained(folder)
    dense = from_pretrained(folder, attn_implementation="eager")
    assert (dense(x).logits - model(x).logits).abs().max() > 0.1
    model.set_attn_implementation("eager")
    assert torch.equal(dense(x).logits, model(x).logits)
    model.set_attn_implementation("attnopt")
    assert not torch.equal(dense(x).logits, model(x).logits)


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_what_was_loaded_can_be_reverted_and_converted_again(tmp_path, name):
    tiny_family(name).save_pretrained(tmp_path / "plain")
    auto = AutoModelForCausalLM if FAMILIES[name].causal else AutoModelForMaskedLM
    model = convert(auto.from_pretrained(tmp_path / "plain"), LastK(3))
    assert model.config.model_type == f"attnopt_{name}"
    model.save_pretrained(tmp_path / "student")
    model = from_pretrained(tmp_path / "student")
    logits = model(tokens()).logits
    assert revert(model).config.model_type == name
    assert torch.equal(convert(model, LastK(3))(tokens()).logits, logits)


def test_from_pretrained_names_what_it_found(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "run.json").write_text("{}")
    tiny().save_pretrained(tmp_path / "plain")
    for path, message in {
        "empty": "holds no config.json, but nothing",
        "notes": "holds no config.json, but run.json",
        "notes/run.json": "is a file; expected the folder",
        "plain": "is not a converted model (model_type attnopt_...): its model_type is 'gpt2'",
        "absent": "there is no model folder",
    }.items():
        with pytest.raises(ValueError) as error:
            from_pretrained(tmp_path / path)
        assert message in str(error.value)
