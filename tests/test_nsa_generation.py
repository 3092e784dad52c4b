"""Decoding with cached compressed blocks gives the numbers of decoding without a cache.

Blocks are compressed once, and a step reads no more of the past than it needs. All comparisons are
of the logits of every step: a broken cache rarely changes each argmax.
"""

import re

import pytest
import torch
from generation import NEW, PROMPT, STARTS, assert_equal, decode, prompts
from hypothesis import given, settings
from hypothesis import strategies as st
from small_gpt2 import tiny
from small_llama import tiny_llama
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from attnopt import NSA, LastK, convert, dense_attention, mechanisms
from attnopt.attention import build_mechanism
from attnopt.attention.cache import MechanismLayer
from attnopt.attention.nsa.cache import NSALayer
from attnopt.attention.nsa.compressors import Compressor
from attnopt.generate import cache_bytes
from attnopt.kernels.nsa.geometry import compressed_count

LAYERS = 3

CONFIGS = {
    "merged-mean": NSA(select_block=4, num_selected=2, window=3),
    "merged-weighted": NSA(
        select_block=3, num_selected=2, window=1, sink_blocks=1, compression="weighted"
    ),
    "merged-mlp": NSA(select_block=2, num_selected=3, window=4, compression="mlp"),
    "gates-mean": NSA("gates", select_block=4, window=5),
    "gates-weighted": NSA("gates", 4, 3, 2, 2, 4, 0, 1, "weighted"),
    "gates-mlp": NSA("gates", 2, 5, 3, 3, 2, 1, 0, "mlp"),
    "mixed": {0: NSA("gates", select_block=3, window=2), 2: LastK(4, sinks=2, init="random")},
}
MAKERS = {"gpt2": lambda: tiny(n_positions=256, pad_token_id=0), "llama": tiny_llama}
each_student = pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind in MAKERS for name in CONFIGS]
)
each_config = pytest.mark.parametrize("name", CONFIGS)


def train(module, seed=1):
    """Move the parameters of NSA as training would."""
    torch.manual_seed(seed)
    for name, parameter in module.named_parameters():
        if re.search("compressor|gate", name):
            parameter.data += 0.3 * torch.randn(parameter.shape)
    return module


def student(kind, name):
    return train(convert(MAKERS[kind](), CONFIGS[name]))


@each_config
def test_caches_agree_with_none(name):
    model, inputs = student("gpt2", name), prompts()
    expected = decode(model, inputs, use_cache=False)
    assert_equal(decode(model, inputs), expected)
    assert_equal(decode(model, inputs, past_key_values=DynamicCache()), expected)


@each_student
def test_padded_rows_decode_as_if_alone(kind, name):
    model, inputs = student(kind, name), prompts()
    together = decode(model, inputs)
    for row, start in enumerate(STARTS):
        alone = {key: value[row : row + 1, start:] for key, value in inputs.items()}
        assert_equal(decode(model, alone), [x[row : row + 1] for x in together])


@each_config
def test_prompt_in_chunks(name):
    """The first chunks of the row that starts at 10 are nothing but padding."""
    model, inputs = student("gpt2", name), prompts()
    expected = decode(model, inputs)
    for size in (1, 5):
        assert_equal(decode(model, inputs, prefill_chunk_size=size), expected)


@torch.no_grad()
def in_chunks(model, inputs, sizes):
    """Logits of a forward pass that came in chunks of these sizes."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    cache, parts = model.make_cache(), []
    for part, places in zip(ids.split(sizes, 1), positions.split(sizes, 1), strict=True):
        end = cache.get_seq_length() + part.shape[1]
        known = {"attention_mask": mask[:, :end], "position_ids": places}
        parts.append(model(part, **known, past_key_values=cache).logits)
        assert cache.get_seq_length() == end
    return torch.cat(parts, 1)


@torch.no_grad()
def at_once(model, inputs):
    mask = inputs["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    return model(inputs["input_ids"], attention_mask=mask, position_ids=positions).logits


@each_student
def test_forward_in_chunks_of_any_size(kind, name):
    model, inputs = student(kind, name), prompts(length=60)
    inputs["attention_mask"][1:3, 20:27] = 0  # tokens that are missing within a text
    real, whole = inputs["attention_mask"] == 1, at_once(model, inputs)
    for sizes in ((3, 1, 1, 9, 20, 1, 2, 1, 22), (1,) * 60):
        ours = in_chunks(model, inputs, sizes)
        torch.testing.assert_close(ours[real], whole[real], atol=1e-4, rtol=1e-4)


sizes_of = st.integers(1, 6)


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(
    gates=st.booleans(),
    blocks=st.tuples(sizes_of, sizes_of, sizes_of),
    counts=st.tuples(*[st.integers(0, 2)] * 3),
    window=st.integers(1, 9),
    compression=st.sampled_from(["mean", "weighted", "mlp"]),
    sizes=st.lists(st.integers(1, 11), min_size=1, max_size=6),
    starts=st.lists(st.integers(0, 40), min_size=1, max_size=3),
)
def test_any_chunks_of_any_text(gates, blocks, counts, window, compression, sizes, starts):
    """Whatever the blocks, windows, chunks and paddings."""
    length, (sinks, local, more) = sum(sizes), counts
    if gates:
        block, stride = max(blocks[1:]), min(blocks[1:])
        count = max(1, sinks + local + more)
        shape = ("gates", blocks[0], block, stride, count, window, sinks, local)
    else:
        shape = ("merged", blocks[0], None, None, sinks + more, window, sinks, None)
    inputs = prompts([min(start, length - 1) for start in starts], length)
    model = train(convert(tiny(n_layer=1, initializer_range=0.1), NSA(*shape, compression)))
    real = inputs["attention_mask"] == 1
    ours, whole = in_chunks(model, inputs, sizes)[real], at_once(model, inputs)[real]
    torch.testing.assert_close(ours, whole, atol=5e-5, rtol=1e-4)


@each_student
@torch.no_grad()
def test_a_text_without_padding_needs_no_mask(kind, name):
    model, ids = student(kind, name), prompts([0, 0], 30)["input_ids"]
    cache = model.make_cache()
    parts = [model(part, past_key_values=cache).logits for part in ids.split((5, 7, 1, 1, 16), 1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(ids).logits, atol=1e-4, rtol=1e-4)
    assert all(layer.key_mask is None for layer in cache.layers if isinstance(layer, NSALayer))


@torch.no_grad()
def test_a_mask_may_come_late():
    model, ids = student("gpt2", "gates-mean"), prompts([0, 0], 30)["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, 17:19] = 0
    whole = model(ids, attention_mask=mask, position_ids=torch.arange(30)[None]).logits
    cache, parts, end = model.make_cache(), [], 0
    for size, given_mask in ((9, None), (5, None), (6, mask), (1, mask), (9, mask)):
        part, end = ids[:, end : end + size], end + size
        options = {} if given_mask is None else {"attention_mask": given_mask[:, :end]}
        options["position_ids"] = torch.arange(end - size, end)[None]
        parts.append(model(part, past_key_values=cache, **options).logits)
    ours = torch.cat(parts, 1)
    torch.testing.assert_close(ours[mask == 1], whole[mask == 1], atol=1e-4, rtol=1e-4)


@each_config
def test_beam_search(name):
    model, inputs = student("gpt2", name), prompts()
    options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 8}
    ours = decode(model, inputs, **options)
    assert torch.equal(ours[0], decode(model, inputs, use_cache=False, **options)[0])
    assert len({tuple(row) for row in ours[0].tolist()}) > len(STARTS)


@each_student
@pytest.mark.parametrize("gradients", [False, True])
def test_rows_survive_batch_operations(kind, name, gradients):
    """Repeat, then select: what beam search and contrastive decoding do to a cache."""
    model, inputs = student(kind, name), prompts(length=30)
    rows, steps = torch.tensor([3, 0, 2]), torch.tensor([[5, 8], [9, 1], [4, 4]])
    with torch.set_grad_enabled(gradients):
        cache = model.make_cache()
        cache.batch_repeat_interleave(2)  # an empty cache has no rows yet
        cache.batch_select_indices(rows)
        model(**inputs, past_key_values=cache)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(2 * rows + 1)
        full = DynamicCache()
        selected = {key: value[rows] for key, value in inputs.items()}
        model(**selected, past_key_values=full)
        mask = selected["attention_mask"]
        for step in steps.split(1, 1):
            mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], 1)
            ours, expected = (
                model(step, attention_mask=mask, past_key_values=held).logits
                for held in (cache, full)
            )
            torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


@each_student
def test_gradients_pass_through_the_cache(kind, name):
    model, inputs = student(kind, name), prompts(length=30)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    gradients = []
    for sizes in ((30,), (13, 1, 6, 10)):
        cache, parts, end = model.make_cache() if len(sizes) > 1 else None, [], 0
        for part, places in zip(ids.split(sizes, 1), positions.split(sizes, 1), strict=True):
            end += part.shape[1]
            known = {"attention_mask": mask[:, :end], "position_ids": places}
            parts.append(model(part, **known, past_key_values=cache).logits)
        model.zero_grad()
        torch.cat(parts, 1)[mask == 1].square().mean().backward()
        gradients.append([p.grad for m in mechanisms(model).values() for p in m.parameters()])
    for whole, ours in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, whole, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["merged-mlp", "gates-mean", "mixed"])
def test_continues_from_its_cache(name):
    model, inputs = student("llama", name), prompts([0, 0])
    whole = decode(model, inputs)
    cache = model.make_cache()
    first = model.generate(**inputs, past_key_values=cache, max_new_tokens=6, do_sample=False)
    mask = torch.ones_like(first)
    settings = {"max_new_tokens": NEW - 6, "do_sample": False}
    rest = model.generate(first, attention_mask=mask, past_key_values=cache, **settings)
    assert torch.equal(rest[:, PROMPT:], whole[0])


def test_prompt_lookup_falls_back_to_full_keys():
    model, inputs = student("gpt2", "merged-weighted"), prompts([0])
    plain = decode(model, inputs)[0]
    assert torch.equal(decode(model, inputs, prompt_lookup_num_tokens=3)[0], plain)


@pytest.mark.parametrize("name", ["merged-weighted", "gates-mlp"])
def test_decodes_in_bfloat16(name):
    model, inputs = student("gpt2", name).to(torch.bfloat16), prompts()
    cache = model.make_cache()
    ours = decode(model, inputs, past_key_values=cache, max_new_tokens=2)[1]
    expected = decode(model, inputs, use_cache=False, max_new_tokens=2)[1]
    torch.testing.assert_close(ours[:, 0], expected[:, 0], atol=0.02, rtol=0.02)
    assert cache.layers[0].compressed_keys.dtype == cache.layers[0].keys.dtype == torch.bfloat16


def test_goes_on_after_inference_mode():
    model, inputs = student("gpt2", "gates-weighted"), prompts([0, 0], 20)
    ids = inputs["input_ids"]
    cache = model.make_cache()
    with torch.inference_mode():  # whose tensors cannot be written to afterwards
        model(ids[:, :12], past_key_values=cache)
        model(ids[:, 12:15], past_key_values=cache)  # with room to spare
    with torch.no_grad():
        ours = model(ids[:, 15:], past_key_values=cache).logits
    torch.testing.assert_close(ours, model(ids).logits[:, 15:], atol=1e-4, rtol=1e-4)


# --- memory and reads -------------------------------------------------------------------------


def test_memory_is_the_tokens_and_their_blocks():
    model, inputs = student("llama", "gates-weighted"), prompts(length=40)
    cache = model.make_cache()
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
    layer, rows, heads, dim = cache.layers[0], len(STARTS), 2, 8
    blocks = compressed_count(40, 3, 2)
    assert layer.keys.shape == layer.values.shape == (rows, heads, 40, dim)
    assert layer.compressed_keys.shape == layer.compressed_values.shape
    assert layer.compressed_keys.shape == (rows, heads, blocks, dim)
    assert layer.key_mask.dtype == torch.bool and layer.start.tolist() == STARTS
    # one entry to spare, for the block that is not whole yet
    entries = 2 * heads * dim * 4 * (40 + blocks + 1)
    assert cache_bytes(cache) == LAYERS * rows * (entries + 40 + 8)
    decode(model, inputs, past_key_values=(held := model.make_cache()), max_new_tokens=30)
    assert cache_bytes(held) <= 2 * cache_bytes(cache)
    assert held.layers[0].compressed_keys.shape[2] == compressed_count(69, 3, 2)


class Reads(TorchDispatchMode):
    """Floating-point elements that operators read and write; a view is nothing."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001
        out = func(*args, **(kwargs or {}))
        name, results = func._schema.name, func._schema.returns
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in results)
        if is_view or "empty" in name:
            return out
        tensors = [*args, *(kwargs or {}).values(), *(out if isinstance(out, tuple) else [out])]
        if re.search("gather|index", name):
            tensors = [out, out]  # of what is gathered from, these elements are read
        elif re.search("scatter_|copy_", name):
            tensors = [*args[1:], *args[-1:]]
        nested = [y for x in tensors for y in (x if isinstance(x, list | tuple) else [x])]
        self.total += sum(
            x.numel() for x in nested if isinstance(x, torch.Tensor) and x.is_floating_point()
        )
        return out


HEADS, KV_HEADS, DIM, STEPS = 4, 2, 16, 24
LONG = {
    "merged": NSA(select_block=8, num_selected=2, window=17),
    "gates": NSA("gates", select_block=16, window=16, compression="weighted"),
    "mlp": NSA(select_block=8, num_selected=2, window=8, compression="mlp"),
}


@torch.no_grad()
def reads_of_steps(config, length, padded, layer):
    """Elements read and written per step of decoding after so many tokens."""
    torch.manual_seed(0)
    shape = {"num_heads": HEADS, "num_kv_heads": KV_HEADS, "head_dim": DIM, "hidden_size": 8}
    mechanism = build_mechanism(config, layer_idx=0, **shape)
    mask = torch.ones(2, length + STEPS, dtype=torch.bool)
    mask[0, :9] = False
    reads = Reads()
    for begin, end in [(0, length), *((i, i + 1) for i in range(length, length + STEPS))]:
        q, k, v = (torch.randn(2, h, end - begin, DIM) for h in (HEADS, KV_HEADS, KV_HEADS))
        hidden = torch.randn(2, end - begin, 8)
        if begin <= length:
            reads.total = 0  # the first step makes room for as many again
        with reads:
            layer.observe(mask[:, :end] if padded else None)
            keys, values = layer.update(k, v)
            layer.attend(mechanism, q, keys, values, hidden_states=hidden)
        if begin <= length:
            reads.total = 0
    return reads.total / (STEPS - 1)


class Forgetful(NSALayer):
    """Compresses all of the past in every step."""

    def attend(self, mechanism, q, k, v, **options):
        return MechanismLayer.attend(self, mechanism, q, k, v, **options)


@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("padded", [False, True])
def test_a_step_reads_blocks_and_not_tokens(name, padded):
    config, lengths = LONG[name], (600, 2600)
    blocks = (lengths[1] - lengths[0]) / config.compress_stride
    # per block: its key and value, and some numbers per head for its score and its importance
    allowed = 2 * (2 * KV_HEADS * DIM + 56 * HEADS)

    def growth(layer):
        short, long = (reads_of_steps(config, n, padded, layer()) for n in lengths)
        return (long - short) / blocks

    assert 2 * 2 * KV_HEADS * DIM < growth(NSALayer) < allowed
    assert growth(Forgetful) > 2 * allowed


@pytest.mark.parametrize("start", [None, 0, 7, 20])
@pytest.mark.parametrize("name", ["merged-mean", "gates-weighted", "gates-mlp"])
def test_every_block_is_compressed_once(name, start, monkeypatch):
    counts, pool = [], Compressor.pool

    def counted(self, blocks, real=None):
        counts.append(blocks.shape[2])
        return pool(self, blocks, real)

    monkeypatch.setattr(Compressor, "pool", counted)
    model, config = student("gpt2", name), CONFIGS[name]
    inputs, cache = prompts([start or 0] * 2, 50), model.make_cache()
    with torch.no_grad():
        for part in inputs["input_ids"].split((17, 1, 1, 1, 10, 1, 1, 1, 17), 1):
            end = cache.get_seq_length() + part.shape[1]
            mask = None if start is None else inputs["attention_mask"][:, :end]
            model(part, attention_mask=mask, past_key_values=cache)
    blocks = compressed_count(50 - (start or 0), config.compress_block, config.compress_stride)
    assert sum(counts) == 2 * LAYERS * blocks


# --- the layer --------------------------------------------------------------------------------


def test_layers_are_those_of_their_mechanisms():
    names = [type(layer).__name__ for layer in student("gpt2", "mixed").make_cache().layers]
    assert names == ["NSALayer", "DynamicLayer", "SinkWindowLayer"]


@torch.no_grad()
def test_rows_begin_where_their_first_token_is():
    """Rows that have seen nothing but padding begin later, and only once."""
    model, inputs = student("gpt2", "merged-mean"), prompts(length=14)
    mask = inputs["attention_mask"]
    mask[0, 8] = 0  # a hole is no new beginning
    cache, starts = model.make_cache(), []
    for end in (2, 4, 9, 10, 14):
        begin = cache.get_seq_length()
        ids = inputs["input_ids"][:, begin:end]
        model(ids, attention_mask=mask[:, :end], past_key_values=cache)
        starts.append(cache.layers[1].start.tolist())
    assert starts == [[2, 0, 1, 2], [4, 0, 1, 4], [5, 0, 1, 9], [5, 0, 1, 10], [5, 0, 1, 10]]
    assert torch.equal(cache.layers[1].key_mask, mask.bool())


@pytest.mark.parametrize("name", ["merged-weighted", "gates-mean", "mixed"])
def test_a_cache_can_be_reused_after_reset(name):
    model, inputs = student("gpt2", name), prompts()
    cache = model.make_cache()
    first = decode(model, inputs, past_key_values=cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert_equal(decode(model, inputs, past_key_values=cache), first)


def test_cannot_be_cropped():
    model = student("gpt2", "merged-mean")
    cache = model.make_cache()
    assert not cache.is_croppable
    model(**prompts([0]), past_key_values=cache)
    with pytest.raises(ValueError, match="a cache with compressed blocks cannot be cropped"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="does not serve dense attention"), dense_attention(model):
        model(torch.ones(1, 1, dtype=torch.long), past_key_values=cache)
