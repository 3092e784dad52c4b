"""Classifiers, taggers and bare backbones convert like the language model of their family."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import tiny_family, tokens
from small_gpt2 import assert_same, snapshot
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertLMHeadModel,
    LlamaForSequenceClassification,
)

from attnopt import LastK, convert, from_pretrained, mechanisms, revert
from attnopt.convert.families import FAMILIES, heads

CELLS = [(name, auto) for name in FAMILIES for auto in heads(FAMILIES[name])]
FEW = ("gpt2", "llama", "bert", "opt", "gpt_neox")


def cell_id(value):
    return value if isinstance(value, str) else value.__name__


def outputs(model, x):
    return [value for value in model(x).to_tuple() if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize(("name", "auto"), CELLS, ids=cell_id)
@torch.no_grad()
def test_every_head_converts_and_comes_back(name, auto):
    base, x = tiny_family(name, auto=auto), tokens()
    before, expected = snapshot(base), outputs(base, x)
    model = convert(copy.deepcopy(base), LastK(x.shape[1]))
    assert type(model).__name__ == f"Attnopt{type(base).__name__}"
    for ours, theirs in zip(outputs(model, x), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=5e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="output_attentions=True is not possible"):
        model(x, output_attentions=True)  # who checks inputs is called, whatever the head
    assert_same(before, snapshot(revert(model)))


@pytest.mark.parametrize(("name", "auto"), [c for c in CELLS if c[0] in FEW], ids=cell_id)
@torch.no_grad()
def test_every_head_is_saved_and_loaded(name, auto, tmp_path):
    model, x = convert(tiny_family(name, auto=auto), LastK(3, init="random"), [1]), tokens()
    expected = outputs(model, x)
    model.save_pretrained(tmp_path)
    for load in (from_pretrained, auto.from_pretrained):
        loaded = load(tmp_path)
        assert type(loaded) is type(model) and list(mechanisms(loaded)) == [1]
        for ours, theirs in zip(outputs(loaded, x), expected, strict=True):
            assert torch.equal(ours, theirs)
        modules = [m for m in loaded.modules() if m._forward_pre_hooks]
        assert [len(m._forward_pre_hooks) for m in modules] == [1, 1]  # backbone and layer 1
    twin = pickle.loads(pickle.dumps(loaded))
    assert torch.equal(outputs(twin, x)[0], expected[0])
    assert type(revert(loaded)) is type(tiny_family(name, auto=auto))


@torch.no_grad()
def test_one_head_loads_the_layers_of_another(tmp_path):
    model, x = convert(tiny_family("llama"), LastK(3, init="random")), tokens()
    model.save_pretrained(tmp_path)
    bare = AutoModel.from_pretrained(tmp_path)
    assert type(bare).__name__ == "AttnoptLlamaModel"
    expected = model.model(x).last_hidden_state
    assert torch.equal(bare(x).last_hidden_state, expected)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert issubclass(type(classifier), LlamaForSequenceClassification)
    assert torch.equal(classifier.model(x).last_hidden_state, expected)


@torch.no_grad()
def test_positional_inputs_of_a_backbone():
    model, x = convert(tiny_family("llama", auto=AutoModel), LastK(3)), tokens()
    mask = torch.ones_like(x)
    mask[0, :5] = 0
    expected = model(input_ids=x, attention_mask=mask).last_hidden_state
    assert torch.equal(model(x, mask).last_hidden_state, expected)
    with pytest.raises(ValueError, match="got the shape"):
        model(x, mask[:, :5])


def test_another_process_loads_and_unpickles(tmp_path):
    """Converted classes are made on demand: where nothing is converted yet, too."""
    name = "qwen3"
    model, x = convert(tiny_family(name), LastK(3)), tokens(1)
    model.save_pretrained(tmp_path)
    (tmp_path / "model.pickle").write_bytes(pickle.dumps(model))
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
import pickle
from pathlib import Path
import torch, transformers
import attnopt.convert
assert "transformers.models.qwen3.modeling_qwen3" not in sys.modules
x = torch.tensor({x.tolist()!r})
folder = Path({str(tmp_path)!r})
for load in (
    lambda: transformers.AutoModelForCausalLM.from_pretrained(folder),
    lambda: pickle.loads((folder / "model.pickle").read_bytes()),
):
    model = load()
    assert type(model).__name__ == "AttnoptQwen3ForCausalLM"
    print(model(x).logits.double().sum().item())
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    )
    expected = model(x).logits.double().sum().item()
    assert [float(line) for line in done.stdout.split()] == [expected] * 2


def test_mixtral_keeps_the_form_of_its_checkpoint(tmp_path):
    """Its files hold each expert by itself, the model all in one tensor."""
    tiny_family("mixtral").save_pretrained(tmp_path / "stock")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "stock")
    x = tokens()
    convert(model, LastK(3)).save_pretrained(tmp_path / "converted")
    loaded, information = AutoModelForCausalLM.from_pretrained(
        tmp_path / "converted", output_loading_info=True
    )
    assert not any(information[key] for key in ("missing_keys", "unexpected_keys"))
    assert torch.equal(loaded(x).logits, model(x).logits)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda c: BertLMHeadModel(c), "BertForMaskedLM, BertForQuestionAnswering"),
        (lambda c: AutoModel.from_config(_decoder(c)), "is in both directions; its config asks"),
    ],
)
def test_an_encoder_is_no_decoder(make, message):
    with pytest.raises(ValueError) as error:
        convert(make(tiny_family("bert").config), LastK(3))
    assert message in str(error.value)


def _decoder(config):
    config.is_decoder = True
    return config
