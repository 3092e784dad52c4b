"""Random calls of the public ops for hypothesis: valid ones, and ones with one argument spoiled."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from attention_inputs import LAYOUTS, MASKS, make_mask, make_qkv
from hypothesis import strategies as st
from torch import Tensor

from attnopt import (
    favor_attention,
    lastk_attention,
    mean_compress,
    nsa_attention,
    orthogonal_projection,
    select_blocks,
    sliding_window_attention,
)

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HEAD_DIMS = (1, 2, 3, 8, 20)
# Of q and k. Beyond STEADY a rounding of the scores moves a softmax: only finiteness is asked for.
SPREADS = (1.0, 1.0, 1.0, 0.0, 0.1, 3.0, 30.0, 100.0)
STEADY = 3.0


@dataclass(frozen=True)
class Call:
    """One call of an op: its name, the function, all arguments by name."""

    op: str
    function: Callable[..., Tensor]
    tensors: dict[str, Any]
    options: dict[str, Any]
    spread: float
    spoiled: str = ""

    def run(
        self, dtype: torch.dtype | None = None, upstream: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, dict]:
        """The output and the gradients of every floating-point tensor, for a fixed upstream."""
        inputs = {}
        for name, x in self.tensors.items():
            if isinstance(x, Tensor) and x.is_floating_point():
                x = x.detach().to(dtype or x.dtype).requires_grad_()
            inputs[name] = x
        out = self.function(**inputs, **{**self.options, **options})
        upstream = (self.upstream() if upstream is None else upstream).to(out.dtype)
        wanted = {n: x for n, x in inputs.items() if isinstance(x, Tensor) and x.requires_grad}
        grads = torch.autograd.grad(out, [*wanted.values()], upstream, allow_unused=True)
        return out, dict(zip(wanted, grads, strict=True))

    def upstream(self) -> Tensor:
        """A gradient of the output."""
        return torch.randn(self.tensors["q"].shape, generator=torch.Generator().manual_seed(1))

    def documents(self) -> Iterator[tuple["Call", slice]]:
        """A call for each packed document alone, with its tokens; otherwise just this one."""
        if self.tensors.get("cu_seqlens") is None:
            yield self, slice(None)
            return
        begin, blocks = 0, 0
        for end in self.tensors["cu_seqlens"].tolist()[1:]:
            own = slice(begin, end)
            cut = {"cu_seqlens": None, **{n: self.tensors[n][:, :, own] for n in ("q", "k", "v")}}
            if self.op == "nsa":
                block, stride = (self.options[f"compress_{x}"] for x in ("block", "stride"))
                held = slice(blocks, blocks + max(0, (end - begin - block) // stride + 1))
                cut |= {n: self.tensors[n][:, :, held] for n in ("k_cmp", "v_cmp")}
                gates = self.tensors["gates"]
                cut["gates"] = None if gates is None else gates[:, :, own]
                blocks = held.stop
            yield replace(self, tensors={**self.tensors, **cut}), own
            begin = end

    def define(self) -> tuple[Tensor, dict]:
        """What `run` must give, by the definition in float64, of each document alone."""
        outs, found = [], []
        for alone, own in self.documents():
            upstream = self.upstream()[:, :, own]
            out, grads = alone.run(torch.float64, upstream, backend="reference")
            outs.append(out)
            found.append(grads)
        whole = {}
        for name in found[0]:
            parts = [grads[name] for grads in found]
            if None not in parts:
                whole[name] = torch.cat(parts, 2) if name in PER_TOKEN else sum(parts)
        return torch.cat(outs, 2), whole


PER_TOKEN = ("q", "k", "v", "k_cmp", "v_cmp", "gates")


@st.composite
def valid_calls(draw: Callable) -> Call:
    """Calls that every op must serve."""
    return draw(st.sampled_from(BUILDERS))(draw)


@st.composite
def spoiled_calls(draw: Callable) -> Call:
    """A valid call with one argument replaced by something hostile."""
    call = draw(valid_calls())
    name = draw(st.sampled_from([*call.tensors, *call.options, "dtype"]))
    if name == "dtype":  # one of q, k, v differs
        name = draw(st.sampled_from(["q", "k", "v"]))
        other = [d for d in DTYPES if d != call.tensors["q"].dtype]
        bad: Any = call.tensors[name].to(draw(st.sampled_from(other)))
    elif name in call.tensors and call.tensors[name] is not None:
        bad = draw(st.sampled_from(_spoil(call.tensors[name])))
    else:
        bad = draw(st.sampled_from(HOSTILE))
    part = "tensors" if name in call.tensors else "options"
    return replace(call, spoiled=name, **{part: {**getattr(call, part), name: bad}})


HOSTILE: tuple[Any, ...] = (
    None, -1, 0, 1, 2, 2000, True, 1.5, float("nan"), float("inf"), "", "text", (), [1],
    torch.zeros(2), torch.zeros(2, 3, 4, 5), torch.ones(1, dtype=torch.bool), object(),
)  # fmt: skip


def _spoil(x: Tensor) -> list[Any]:
    """Things that are nearly the tensor."""
    changed = [
        None, 3, "text", x.tolist(), x.numpy(force=True) if x.dtype != torch.bfloat16 else [x],
        x[None], x.flatten(), x[..., :0], x.to(torch.int64), x.to("meta"),
        torch.cat([x, x[..., -1:]], -1), torch.cat([x, x[:1]], 0), x.to(torch.complex64),
        x.to_sparse(), torch.zeros(()),
    ]  # fmt: skip
    if x.dim() == 1:
        changed += [x.flip(0), -x, x + 1, x[1:], x[:-1]]
    if x.dim() > 1:
        changed += [torch.cat([x, x[:, :1]], 1), x[:, :0]]
    if x.dim() > 2:
        changed += [torch.cat([x, x[:, :, :1]], 2), x[:, :, :-1], x.transpose(1, 2)]
    return changed


def _inputs(draw: Callable, queries_last: bool = True) -> tuple[dict[str, Any], float, Callable]:
    packed = draw(st.sampled_from([False, False, True]))
    batch, groups, hkv = (draw(st.integers(1, 3)) for _ in range(3))
    batch = 1 if packed else batch
    queries = draw(st.integers(1, 40))
    extra = draw(st.sampled_from([0, 0, 1, 9]))
    tokens = queries + (extra if queries_last and not packed else 0)
    dim, dtype = draw(st.sampled_from(HEAD_DIMS)), draw(st.sampled_from(DTYPES))
    spread, rng = draw(st.sampled_from(SPREADS)), torch.Generator()
    rng.manual_seed(draw(st.integers(0, 2**20)))

    def rand(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype)

    layout = draw(st.sampled_from(LAYOUTS))
    q, k, v = make_qkv(layout, batch, hkv * groups, hkv, queries, tokens, dim, rand)
    mask, documents = make_mask(draw(st.sampled_from(MASKS)), batch, tokens, rng), None
    if packed:
        cuts = draw(st.sets(st.integers(1, tokens), max_size=5)) - {tokens}
        documents = torch.tensor([0, *sorted(cuts), tokens])
        mask = None
    tensors = {"q": spread * q, "k": spread * k, "v": v, "key_mask": mask, "cu_seqlens": documents}
    return tensors, spread, rand


def _scale(draw: Callable) -> float | None:
    return draw(st.sampled_from([None, None, 0.3, 1.0]))


def _lastk(draw: Callable) -> Call:
    causal = draw(st.sampled_from([True, True, False]))
    tensors, spread, rand = _inputs(draw, queries_last=causal)
    heads, tokens = tensors["q"].shape[1], tensors["k"].shape[2]
    window, sinks = draw(st.integers(1, tokens + 5)), draw(st.sampled_from([None, 0, 1, 3, 50]))

    def weights(count: int) -> Tensor:
        shape = (heads, count) if draw(st.booleans()) else (count,)
        values = rand(*shape).to(torch.float64 if draw(st.booleans()) else torch.float32)
        return values.masked_fill(rand(*shape) > draw(st.sampled_from([9.0, 0.5])), -torch.inf)

    tensors["log_weights"] = weights(window if causal else 2 * window - 1)
    tensors["sink_log_weights"] = None if sinks is None else weights(sinks)
    options = {"scale": _scale(draw), "causal": causal}
    return Call("lastk", lastk_attention, tensors, options, spread)


def _sliding(draw: Callable) -> Call:
    causal = draw(st.booleans())
    tensors, spread, _ = _inputs(draw, queries_last=causal)
    options = {"window": draw(st.integers(1, 60)), "scale": _scale(draw), "causal": causal}
    return Call("sliding", sliding_window_attention, tensors, options, spread)


def _favor(draw: Callable) -> Call:
    feature_map = draw(st.sampled_from(["favor", "hedgehog", "exp", "relu", "taylor"]))
    causal = draw(st.sampled_from([True, True, False]))
    tensors, spread, rand = _inputs(draw, queries_last=causal)
    heads, dim = tensors["q"].shape[1], tensors["q"].shape[3]
    window = draw(st.sampled_from([0, 0, 1, 5, 33])) if causal else 0
    rows = None
    if feature_map != "taylor":
        rng = torch.Generator().manual_seed(draw(st.integers(0, 99)))
        per_head = heads if draw(st.booleans()) else None
        rows = orthogonal_projection(draw(st.integers(1, 20)), dim, heads=per_head, generator=rng)
    tensors["projection"] = rows
    gate = window and draw(st.booleans())
    tensors["log_gate"] = rand(heads).float() if gate else None
    options = {
        "feature_map": feature_map,
        "window": window,
        "window_block": draw(st.sampled_from([1, 4, 32])),
        "causal": causal,
        "scale": _scale(draw),
        "stabilizer": draw(st.sampled_from(["running", "running", "static"])),
    }
    return Call("favor", favor_attention, tensors, options, spread)


def _nsa(draw: Callable) -> Call:
    tensors, spread, rand = _inputs(draw)
    q, k, v, mask, documents = tensors.values()
    select = draw(st.integers(1, 9))
    gates = draw(st.booleans())
    block = draw(st.integers(1, 9)) if gates else select
    stride = draw(st.integers(1, block)) if gates else select
    sinks, local = draw(st.integers(0, 2)), draw(st.integers(0, 2)) if gates else 0
    for name, x in (("k_cmp", k), ("v_cmp", v)):
        tensors[name] = mean_compress(
            x, compress_block=block, compress_stride=stride, key_mask=mask, cu_seqlens=documents
        )
    shape = (*q.shape[:3], 3)
    tensors["gates"] = rand(*shape).sigmoid() if gates else None
    options = {
        "combine": "gates" if gates else "merged",
        "compress_block": block,
        "compress_stride": stride,
        "select_block": select,
        "num_selected": sinks + local + draw(st.integers(0 if sinks + local else 1, 3)),
        "window": draw(st.integers(1, 50)),
        "sink_blocks": sinks,
        "local_blocks": local if gates else None,
        "scale": _scale(draw),
        "regime": draw(st.sampled_from(["auto", "short", "long"])),
    }
    return Call("nsa", nsa_attention, tensors, options, spread)


BUILDERS = (_lastk, _sliding, _favor, _nsa)


def selections(call: Call, dtype: torch.dtype) -> list[Tensor]:
    """The blocks that a call of NSA selects in this precision; near ties may differ."""
    if call.op != "nsa":
        return []
    o = call.options
    return [
        select_blocks(
            alone.tensors["q"].to(dtype),
            alone.tensors["k_cmp"].to(dtype),
            compress_block=o["compress_block"],
            compress_stride=o["compress_stride"],
            select_block=o["select_block"],
            num_selected=o["num_selected"],
            sink_blocks=o["sink_blocks"],
            local_blocks=o["local_blocks"] or 0,
            num_tokens=alone.tensors["k"].shape[2],
            key_mask=alone.tensors["key_mask"],
            scale=o["scale"],
        )
        for alone, _ in call.documents()
    ]
