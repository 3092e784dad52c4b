"""Packed documents in converted models: each gives what it gives alone."""

import copy

import pytest
import torch
from families import LENGTH, converted, mixed, tiny_family, tokens
from transformers import DataCollatorWithFlattening, DynamicCache

from attnopt import LastK, convert, dense_attention
from attnopt.convert.families import FAMILIES

# lengths of the documents of two rows
ROWS = ((7, 11), (1, 5, 12))


def model_of(name):
    return converted(tiny_family(name, layers=len(mixed(name)) + 1), mixed(name))


def packed(rows=ROWS):
    """One batch of packed rows, and its documents by themselves."""
    x = tokens(len(rows))
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])
    documents = [part[None] for line, row in zip(x, rows, strict=True) for part in line.split(row)]
    return {"input_ids": x, "position_ids": positions}, documents


def alone(model, document):
    positions = torch.arange(document.shape[1])[None]
    return model(document, position_ids=positions).logits[0]


@pytest.mark.parametrize("name", [n for n in FAMILIES if FAMILIES[n].packs])
@torch.no_grad()
def test_documents_do_not_see_each_other(name):
    model, (batch, documents) = model_of(name), packed()
    logits = model(**batch).logits.flatten(0, 1)
    expected = torch.cat([alone(model, document) for document in documents])
    torch.testing.assert_close(logits, expected, atol=5e-5, rtol=1e-4)
    seen = model(batch["input_ids"]).logits.flatten(0, 1)
    assert (seen - expected).abs().max() > 0.01


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_documents(name, checkpointing):
    model, (batch, documents) = model_of(name), packed()
    model.train()  # without dropout
    runs = []
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for logits in (
        lambda: model(**batch).logits.flatten(0, 1),
        lambda: torch.cat([alone(model, document) for document in documents]),
    ):
        model.zero_grad()
        logits().square().mean().backward()
        runs.append([p.grad for p in model.parameters()])
    for ours, theirs in zip(*runs, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_the_dense_model_keeps_documents_apart_or_says_that_it_cannot(name):
    family = FAMILIES[name]
    base, (batch, documents) = tiny_family(name), packed()
    expected = torch.cat([alone(base, document) for document in documents])
    logits = base(**batch, use_cache=False).logits
    apart = torch.allclose(logits.flatten(0, 1), expected, atol=5e-5)
    assert apart == family.dense_packs
    model = convert(copy.deepcopy(base), LastK(3))
    with dense_attention(model):
        if apart:
            assert torch.equal(model(**batch).logits, logits)
        else:
            with pytest.raises(ValueError, match=f"attention of {name} does not keep packed"):
                model(**batch)
    if not family.packs:
        with pytest.raises(ValueError, match=f"not possible with {name}"):
            model(**batch)


@torch.no_grad()
def test_takes_what_the_flattening_collator_makes():
    model = model_of("llama")
    _, documents = packed()
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    batch = collate([{"input_ids": document[0].tolist()} for document in documents])
    batch.pop("labels")
    assert {"cu_seq_lens_q", "max_length_q"} < set(batch) and batch["input_ids"].shape[0] == 1
    expected = torch.cat([alone(model, document) for document in documents])
    ours = model(**batch).logits[0]
    torch.testing.assert_close(ours, expected, atol=5e-5, rtol=1e-4)


@torch.no_grad()
def test_compiles_with_the_documents_given():
    model, (batch, _) = model_of("llama"), packed()
    expected = model(**batch).logits
    begins = torch.tensor([0, 7, 18, 19, 24, 36], dtype=torch.int32)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    logits = compiled(**batch, cu_seq_lens_q=begins, max_length_q=12).logits
    torch.testing.assert_close(logits, expected)
    with pytest.raises(RuntimeError, match="packed documents need cu_seq_lens_q"):
        compiled(**batch)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_mask": torch.ones(2, LENGTH)}, "packed documents come without"),
        ({"past_key_values": DynamicCache()}, "packed documents come without"),
        ({"position_ids": None, "cu_seq_lens_q": torch.tensor([0, 36])}, "need position_ids"),
        ({"cu_seq_lens_q": torch.tensor([0, 18, 36])}, "[0, 7, 18, 19, 24, 36]; got [0, 18, 36]"),
    ],
    ids=["mask", "cache", "no-positions", "other-documents"],
)
def test_refuses(options, message):
    model, (batch, _) = model_of("llama"), packed()
    with pytest.raises(ValueError) as error:
        model(**batch | options)
    assert message in str(error.value)


def test_a_mask_may_make_positions_jump():
    """Padding before a text is no document: positions restart only between two real tokens."""
    model, x = model_of("llama"), tokens(1)
    mask = torch.ones_like(x)
    mask[:, :4] = 0
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)  # as generate makes them
    assert (positions.diff() != 1).any()
    model(x, attention_mask=mask, position_ids=positions)
