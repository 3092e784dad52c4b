"""Decoding with sums over the past gives the numbers of decoding without a cache, and stays small.

All comparisons are of the logits of every step: a broken cache rarely changes each argmax.
"""

import pytest
import torch
from generation import NEW, PROMPT, STARTS, assert_equal, decode, prompts
from hypothesis import given, settings
from hypothesis import strategies as st
from small_gpt2 import tiny
from transformers import DynamicCache

from attnopt import Favor, LastK, convert, dense_attention, mechanisms
from attnopt.attention.favor.cache import FavorLayer
from attnopt.generate import cache_bytes
from attnopt.kernels.favor.state import FavorState

LAYERS, HEADS, DIM = 3, 4, 8

CONFIGS = {
    "favor": Favor(12),
    "static": Favor(12, stabilizer="static", window=2, window_block=3),
    "window": Favor(12, window=5, window_block=4, norms="constant"),
    "block-of-one": Favor(12, window=4, window_block=1),
    "window-of-one": Favor(12, window=1, window_block=4),
    "neither": Favor(12, window=1, window_block=1),
    "wide": Favor(12, window=100),
    "hedgehog": Favor(feature_map="hedgehog", window=3, window_block=2),
    "exp": Favor(10, feature_map="exp"),
    "relu": Favor(10, feature_map="relu", window=2, window_block=2),
    "taylor": Favor(feature_map="taylor", window=3, window_block=4),
    "mixed": {0: Favor(12, window=3, window_block=2), 2: LastK(4, sinks=2, init="random")},
}
each_config = pytest.mark.parametrize("name", CONFIGS)


def student(name):
    model = convert(tiny(n_positions=256, pad_token_id=0), CONFIGS[name])
    torch.manual_seed(1)
    for mechanism in mechanisms(model).values():
        if getattr(mechanism, "log_gate", None) is not None:
            torch.nn.init.normal_(mechanism.log_gate)
    return model


@each_config
def test_caches_agree_with_none(name):
    model, inputs = student(name), prompts()
    expected = decode(model, inputs, use_cache=False)
    assert_equal(decode(model, inputs), expected)
    assert_equal(decode(model, inputs, past_key_values=DynamicCache()), expected)


@each_config
def test_padded_rows_decode_as_if_alone(name):
    model, inputs = student(name), prompts()
    together = decode(model, inputs)
    for row, start in enumerate(STARTS):
        alone = {key: value[row : row + 1, start:] for key, value in inputs.items()}
        assert_equal(decode(model, alone), [x[row : row + 1] for x in together])


@each_config
def test_prompt_in_chunks(name):
    """The first chunks of the row that starts at 10 are nothing but padding."""
    model, inputs = student(name), prompts()
    expected = decode(model, inputs)
    for size in (1, 5):
        assert_equal(decode(model, inputs, prefill_chunk_size=size), expected)


@each_config
def test_forward_in_chunks_of_any_size(name):
    model, inputs = student(name), prompts(length=60)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        whole = model(ids, attention_mask=mask, position_ids=positions).logits
        cache, end = model.make_cache(), 0
        for size in (3, 1, 1, 9, 20, 1, 2, 1, 22):
            begin, end = end, end + size
            logits = model(
                ids[:, begin:end],
                attention_mask=mask[:, :end],
                position_ids=positions[:, begin:end],
                past_key_values=cache,
            ).logits
            assert cache.get_seq_length() == end
            real = mask[:, begin:end] == 1
            torch.testing.assert_close(
                logits[real], whole[:, begin:end][real], atol=1e-4, rtol=1e-4
            )


@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(
    config=st.builds(
        Favor,
        st.just(6),
        feature_map=st.sampled_from(["favor", "hedgehog", "exp", "relu"]),
        window=st.integers(0, 9),
        window_block=st.integers(1, 7),
        stabilizer=st.sampled_from(["running", "static"]),
        seed=st.none(),
    ),
    sizes=st.lists(st.integers(1, 11), min_size=1, max_size=6),
    starts=st.lists(st.integers(0, 40), min_size=1, max_size=3),
)
def test_any_chunks_of_any_text(config, sizes, starts):
    """States put together from chunks, whatever the windows, blocks, chunks and paddings."""
    length = sum(sizes)
    inputs = prompts([min(start, length - 1) for start in starts], length)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    model = convert(tiny(n_layer=1, initializer_range=0.1), config)
    with torch.no_grad():
        whole = model(ids, attention_mask=mask, position_ids=positions).logits
        cache, parts = model.make_cache(), []
        for part, places in zip(ids.split(sizes, 1), positions.split(sizes, 1), strict=True):
            end = cache.get_seq_length() + part.shape[1]
            known = {"attention_mask": mask[:, :end], "position_ids": places}
            parts.append(model(part, **known, past_key_values=cache).logits)
    ours = torch.cat(parts, 1)[mask == 1]
    torch.testing.assert_close(ours, whole[mask == 1], atol=5e-5, rtol=1e-4)


@each_config
def test_a_text_without_padding_needs_no_mask(name):
    model, ids = student(name), prompts([0, 0])["input_ids"]
    cache = model.make_cache()
    parts = [model(part, past_key_values=cache).logits for part in ids.split(5, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(ids).logits, atol=1e-4, rtol=1e-4)


@each_config
def test_beam_search(name):
    model, inputs = student(name), prompts()
    options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 8}
    ours = decode(model, inputs, **options)
    assert torch.equal(ours[0], decode(model, inputs, use_cache=False, **options)[0])
    assert len({tuple(row) for row in ours[0].tolist()}) > len(STARTS)


@each_config
def test_rows_survive_batch_operations(name):
    """Repeat, then select: what beam search and contrastive decoding do to a cache."""
    model, inputs = student(name), prompts(length=30)
    rows, step = torch.tensor([3, 0, 2]), torch.tensor([[5], [9], [4]])
    cache = model.make_cache()
    cache.batch_repeat_interleave(2)  # an empty cache has no rows yet
    cache.batch_select_indices(rows)
    model(**inputs, past_key_values=cache)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(2 * rows + 1)
    mask = torch.cat([inputs["attention_mask"][rows], torch.ones(3, 1, dtype=torch.long)], 1)
    ours = model(step, attention_mask=mask, past_key_values=cache).logits
    full = DynamicCache()
    selected = {key: value[rows] for key, value in inputs.items()}
    model(**selected, past_key_values=full)
    expected = model(step, attention_mask=mask, past_key_values=full).logits
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["favor", "window", "mixed"])
def test_continues_from_its_cache(name):
    model, inputs = student(name), prompts([0, 0])
    whole = decode(model, inputs)
    cache = model.make_cache()
    first = model.generate(**inputs, past_key_values=cache, max_new_tokens=6, do_sample=False)
    mask = torch.ones_like(first)
    settings = {"max_new_tokens": NEW - 6, "do_sample": False}
    rest = model.generate(first, attention_mask=mask, past_key_values=cache, **settings)
    assert torch.equal(rest[:, PROMPT:], whole[0])


@pytest.mark.parametrize("name", ["favor", "window"])
def test_prompt_lookup_falls_back_to_full_keys(name):
    model, inputs = student(name), prompts([0])
    plain = decode(model, inputs)[0]
    assert torch.equal(decode(model, inputs, prompt_lookup_num_tokens=3)[0], plain)


@pytest.mark.parametrize("name", ["window", "hedgehog"])
def test_decodes_in_bfloat16(name):
    model, inputs = student(name).to(torch.bfloat16), prompts()
    cache = model.make_cache()
    ours = decode(model, inputs, past_key_values=cache, max_new_tokens=2)[1]
    expected = decode(model, inputs, use_cache=False, max_new_tokens=2)[1]
    torch.testing.assert_close(ours[:, 0], expected[:, 0], atol=0.02, rtol=0.02)
    state = cache.layers[0].state
    assert state.kv.dtype == torch.float32 and state.keys.dtype == torch.bfloat16


# --- memory -----------------------------------------------------------------------------------


def cache_after(model, inputs, new_tokens):
    cache = model.make_cache()
    settings = {"max_new_tokens": new_tokens, "do_sample": False, "past_key_values": cache}
    model.generate(**inputs, **settings)
    return cache


@pytest.mark.parametrize("name", [n for n in CONFIGS if n not in ("wide", "mixed")])
def test_memory_is_constant(name):
    model, inputs = student(name), prompts()
    short, long = (cache_bytes(cache_after(model, inputs, count)) for count in (30, 50))
    assert short == long
    assert cache_bytes(cache_after(model, prompts(length=100), 1)) <= long


@pytest.mark.parametrize(("window", "block"), [(0, 32), (5, 4), (1, 4), (4, 1), (1, 1)])
def test_memory_is_what_the_state_needs(window, block):
    config = Favor(10, window=window, window_block=block)
    model = convert(tiny(n_positions=256, pad_token_id=0), config)
    rows = len(STARTS)
    sums = 4 * rows * HEADS * 10 * (DIM + 2)
    ring = rows * (2 * 4 * HEADS * DIM + 1)  # keys, values and mask of one token
    held = max(window + block - 2, 0) if window else 0
    for new in (1, 30):  # a step keeps a view of all but one of its tokens
        used = cache_bytes(cache_after(model, prompts(length=40), new)) / LAYERS
        assert sums + held * ring <= used <= sums + (held + (new > 1)) * ring
    state = cache_after(model, prompts(length=40), 3).layers[0].state
    assert (0 if state.keys is None else state.keys.shape[2]) == held


# --- the layer --------------------------------------------------------------------------------


def test_layers_are_those_of_their_mechanisms():
    model = student("favor")
    assert [type(layer) for layer in model.make_cache().layers] == [FavorLayer] * LAYERS
    names = [type(layer).__name__ for layer in student("mixed").make_cache().layers]
    assert names == ["FavorLayer", "DynamicLayer", "SinkWindowLayer"]


def test_the_layer_is_a_state():
    model, inputs = student("window"), prompts()
    cache = model.make_cache()
    layer = cache.layers[1]
    assert layer.state is None and layer.get_seq_length() == 0
    model(**inputs, past_key_values=cache)
    assert isinstance(layer.state, FavorState) and layer.state.kv is layer.kv
    assert layer.get_seq_length() == PROMPT and layer.get_mask_sizes(3) == (PROMPT + 3, 0)
    # row 0 has 7 tokens: its next one, at position 7, reads 0..3 through features
    assert layer.key_mask.sum(1).tolist() == [7 - 0, 12 - 8, 11 - 4, 2]


@pytest.mark.parametrize("name", ["favor", "window", "mixed"])
def test_a_cache_can_be_reused_after_reset(name):
    model, inputs = student(name), prompts()
    cache = model.make_cache()
    first = decode(model, inputs, past_key_values=cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert_equal(decode(model, inputs, past_key_values=cache), first)


def test_summed_tokens_cannot_come_back():
    model = student("favor")
    cache = model.make_cache()
    assert not cache.is_croppable
    model(**prompts([0]), past_key_values=cache)
    with pytest.raises(ValueError, match="a cache with sums over the past cannot be cropped"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="does not serve dense attention"), dense_attention(model):
        model(torch.ones(1, 1, dtype=torch.long), past_key_values=cache)
