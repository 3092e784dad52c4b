"""Decoding with every cache gives the numbers of decoding without one, and stays small.

All comparisons are of the logits of every step: a broken cache rarely changes each argmax.
"""

import pytest
import torch
from generation import NEW, PROMPT, STARTS, assert_equal, decode, prompts
from small_gpt2 import VOCABULARY
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from attnopt import Every, First, LastK, Masks, NthLast, Window, convert, dense_attention
from attnopt.attention.lastk.cache import SinkWindowLayer

PAD = 0

CONFIGS = {
    "last1": LastK(1, init="random"),
    "last5": LastK(5, init="random"),
    "last9-heads": LastK(9, init="random", per_head=True),
    "last1-sink": LastK(1, sinks=1, init="random"),
    "last2-sinks7": LastK(2, sinks=7, init="random"),
    "last5-sinks3": LastK(5, sinks=3, init="random"),
    "last40-sinks3": LastK(40, sinks=3, init="random"),
    "five-last": Masks(init="random"),
    "bands": Masks([NthLast(7), Window(4), First(2)], init="random"),
    "first": Masks([First(4)], init="random"),
    "every": Masks([Every(), NthLast(1), First(2)], init="random"),
    "mixed": {0: LastK(4, sinks=2, init="random"), 2: LastK(3, init="random")},
}
every_config = pytest.mark.parametrize("name", CONFIGS)


def tiny(config, seed=0):
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=256,
            n_embd=32,
            n_layer=3,
            n_head=4,
            initializer_range=0.3,
            bos_token_id=PAD,
            eos_token_id=None,  # nothing ends early
            pad_token_id=PAD,
        )
    ).eval()
    return convert(model, config)


@every_config
def test_caches_agree_with_none(name):
    model, inputs = tiny(CONFIGS[name]), prompts()
    expected = decode(model, inputs, use_cache=False)
    assert_equal(decode(model, inputs), expected)
    assert_equal(decode(model, inputs, past_key_values=DynamicCache()), expected)
    assert_equal(decode(model, inputs, cache_implementation="dynamic"), expected)


@every_config
def test_padded_rows_decode_as_if_alone(name):
    model, inputs = tiny(CONFIGS[name]), prompts()
    together = decode(model, inputs)
    for row, start in enumerate(STARTS):
        alone = {key: value[row : row + 1, start:] for key, value in inputs.items()}
        assert_equal(decode(model, alone), [x[row : row + 1] for x in together])


@every_config
def test_prompt_in_chunks(name):
    model, inputs = tiny(CONFIGS[name]), prompts()
    expected = decode(model, inputs)
    for size in (1, 5):
        assert_equal(decode(model, inputs, prefill_chunk_size=size), expected)


@every_config
def test_forward_in_chunks_of_any_size(name):
    """Chunks longer and shorter than the window, before and after the sinks are gathered."""
    model, inputs = tiny(CONFIGS[name]), prompts(length=60)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp_min(0)
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
        torch.testing.assert_close(logits[real], whole[:, begin:end][real], atol=2e-5, rtol=1e-5)


@every_config
def test_beam_search(name):
    model, inputs = tiny(CONFIGS[name]), prompts()
    options = {"num_beams": 3, "num_return_sequences": 2}
    ours = decode(model, inputs, **options)
    assert torch.equal(ours[0], decode(model, inputs, use_cache=False, **options)[0])
    assert len({tuple(row) for row in ours[0].tolist()}) == len(ours[0])


@pytest.mark.parametrize("name", ["last5", "last5-sinks3", "every"])
def test_sampling_repeats_with_its_seed(name):
    model, inputs = tiny(CONFIGS[name]), prompts()
    options = {"do_sample": True, "temperature": 0.7, "top_k": 50}
    runs = []
    for seed, cached in ((7, True), (7, False), (8, True)):
        torch.manual_seed(seed)
        runs.append(decode(model, inputs, use_cache=cached, **options))
    assert_equal(runs[0], runs[1])
    assert not torch.equal(runs[0][0], runs[2][0])


@pytest.mark.parametrize("name", ["last5", "last5-sinks3", "mixed"])
def test_prompt_lookup_falls_back_to_full_keys(name):
    model, inputs = tiny(CONFIGS[name]), prompts([0])
    plain = decode(model, inputs)[0]
    assert torch.equal(decode(model, inputs, prompt_lookup_num_tokens=3)[0], plain)
    settings = {"max_new_tokens": NEW, "do_sample": False}
    assisted = model.generate(**inputs, assistant_model=model, **settings)
    assert torch.equal(assisted[:, PROMPT:], plain)


@pytest.mark.parametrize("name", ["last5-sinks3", "mixed"])
def test_continues_from_its_cache(name):
    model, inputs = tiny(CONFIGS[name]), prompts([0, 0])
    whole = decode(model, inputs)
    cache = model.make_cache()
    first = model.generate(**inputs, past_key_values=cache, max_new_tokens=6, do_sample=False)
    mask = torch.ones_like(first)
    settings = {"max_new_tokens": NEW - 6, "do_sample": False}
    rest = model.generate(first, attention_mask=mask, past_key_values=cache, **settings)
    assert torch.equal(rest[:, PROMPT:], whole[0])


@every_config
def test_gathered_rows_survive_batch_operations(name):
    """Repeat, then select: what beam search and contrastive decoding do to a cache."""
    model, inputs = tiny(CONFIGS[name]), prompts(length=30)
    rows, step = torch.tensor([3, 0, 2]), torch.tensor([[5], [9], [4]])
    cache = model.make_cache()
    model(**inputs, past_key_values=cache)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(2 * rows + 1)
    mask = torch.cat([inputs["attention_mask"][rows], torch.ones(3, 1, dtype=torch.long)], 1)
    ours = model(step, attention_mask=mask, past_key_values=cache).logits
    full = DynamicCache()
    model(
        inputs["input_ids"][rows],
        attention_mask=inputs["attention_mask"][rows],
        past_key_values=full,
    )
    expected = model(step, attention_mask=mask, past_key_values=full).logits
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-5)


# --- memory -----------------------------------------------------------------------------------


def stored_bytes(cache):
    """Bytes of all tensors that the layers hold on to, storage included."""
    found = {}
    for layer in cache.layers:
        for value in vars(layer).values():
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def bytes_after(model, inputs, new_tokens):
    settings = {"max_new_tokens": new_tokens, "do_sample": False}
    out = model.generate(**inputs, return_dict_in_generate=True, **settings)
    return stored_bytes(out.past_key_values)


@pytest.mark.parametrize("name", [n for n in CONFIGS if n not in ("every", "mixed")])
def test_memory_is_constant(name):
    model, inputs = tiny(CONFIGS[name]), prompts()
    short, long = (bytes_after(model, inputs, count) for count in (50, 80))
    assert short == long


@pytest.mark.parametrize(("window", "sinks"), [(5, 0), (2, 0), (5, 3), (1, 2)])
def test_memory_is_what_the_window_needs(window, sinks):
    model = tiny(LastK(window, sinks=sinks))
    per_token = 2 * 32 * 4 * len(STARTS)  # keys and values, fp32
    used = bytes_after(model, prompts(), 40) / 3  # layers
    if sinks:  # exactly the stored tokens, and one byte of mask for each and for the last step
        stored = window - 1 + sinks
        assert used == stored * per_token + (2 * stored + 1) * len(STARTS)
    else:  # the stock layer keeps a view of W - 1 of the W tokens of its last step
        assert used <= window * per_token + 8
    assert bytes_after(tiny(Masks([Every()])), prompts(), 40) > 5 * 3 * used


def test_memory_of_dense_layers_grows_alone():
    layers = tiny(CONFIGS["mixed"]).make_cache().layers
    kinds = [SinkWindowLayer, DynamicLayer, DynamicSlidingWindowLayer]
    assert [type(layer) for layer in layers] == kinds


def test_nothing_is_dropped_before_every_row_has_its_sinks():
    layer = SinkWindowLayer(window=2, sinks=2)
    mask = torch.arange(9) >= torch.tensor([0, 6])[:, None]
    for end in range(1, 10):
        keys = torch.full((2, 1, 1, 1), float(end))
        layer.observe(mask[:, :end])
        layer.update(keys, -keys)
        if end < 8:  # row 1 has its two sinks, tokens 6 and 7, from the eighth token on
            assert layer.keys.shape[2] == end and not layer.is_compact
    assert layer.keys[:, 0, :, 0].tolist() == [[1, 2, 9], [7, 8, 9]]
    assert torch.equal(layer.values, -layer.keys)
    assert layer.key_mask.all() and layer.get_seq_length() == 9


def test_masked_tokens_stay_masked_after_gathering():
    layer = SinkWindowLayer(window=4, sinks=2)
    mask = torch.tensor([[1, 0, 1, 1, 1, 0, 1], [0, 0, 0, 1, 1, 1, 1]], dtype=torch.bool)
    keys = torch.arange(7.0).expand(2, 1, 7)[..., None]
    layer.observe(mask)
    layer.update(keys, keys)
    assert layer.keys[:, 0, :, 0].tolist() == [[0, 1, 4, 5, 6], [3, 4, 4, 5, 6]]
    # row 0 keeps a hole in its sinks; the copy of sink 4 in row 1 is hidden
    assert layer.key_mask.int().tolist() == [[1, 0, 1, 0, 1], [1, 1, 0, 1, 1]]


def test_a_cache_can_be_reused_after_reset():
    model, inputs = tiny(CONFIGS["last5-sinks3"]), prompts()
    cache = model.make_cache()
    first = decode(model, inputs, past_key_values=cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert_equal(decode(model, inputs, past_key_values=cache), first)


# --- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["static", "offloaded_static"])
def test_static_caches_are_refused(kind):
    model = tiny(LastK(3))
    with pytest.raises(ValueError, match=f"cache_implementation must be .* got '{kind}'"):
        model.generate(**prompts(), max_new_tokens=2, cache_implementation=kind)
    static = StaticCache(model.config, max_cache_len=32)
    with pytest.raises(ValueError, match="got StaticCache with StaticLayer"):
        model.generate(**prompts(), max_new_tokens=2, past_key_values=static)


def test_attention_weights_are_refused():
    with pytest.raises(ValueError, match="output_attentions=True is not possible"):
        tiny(LastK(3)).generate(
            **prompts(), max_new_tokens=2, output_attentions=True, return_dict_in_generate=True
        )


def test_dropped_tokens_cannot_come_back():
    model = tiny(LastK(3, sinks=1))
    cache = model.make_cache()
    assert not cache.is_croppable
    model(**prompts([0]), past_key_values=cache)
    with pytest.raises(ValueError, match="a cache with sinks cannot be cropped"):
        cache.crop(-1)


def test_dense_attention_decodes_with_the_full_cache():
    model, inputs = tiny(LastK(2)), prompts()
    with dense_attention(model):
        out = model.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True)
        assert type(out.past_key_values) is DynamicCache
        assert_equal(decode(model, inputs), decode(model, inputs, use_cache=False))
