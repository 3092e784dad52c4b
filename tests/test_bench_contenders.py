"""What is measured computes what its definition says, and the check would notice if it did not."""

import itertools

import pytest
import torch

from attnopt.bench.contenders import LEVELS, Shape, contenders, find
from attnopt.bench.contenders.base import prepare_op, sampled_runs
from attnopt.bench.contenders.dense import softmax_rows
from attnopt.bench.work import Work

CPU = torch.device("cpu")
CELLS = [
    pytest.param(contender, phase, id=f"{contender.name}-{phase}")
    for contender in contenders(LEVELS)
    for phase in contender.phases
    if contender.level != "model"  # that is twelve blocks
]


@pytest.mark.parametrize(("contender", "phase"), CELLS)
def test_contenders_are_right(contender, phase):
    why = contender.missing(CPU, torch.float32)
    if why is not None:
        pytest.skip(why)
    prepared = contender.prepare(phase, Shape(1, 2, 16, 192), torch.float32, CPU)
    prepared.call()
    errors = prepared.check()
    assert errors and all(error <= prepared.limit for error in errors.values()), errors
    assert prepared.work.flops > 0 and prepared.work.bytes > 0
    if phase == "bwd" and contender.level == "op":
        assert {"out", "dq", "dk", "dv"} <= set(errors)


def test_every_mechanism_is_there_with_a_dense_partner():
    listed = {contender.name: contender for contender in contenders(LEVELS)}
    for level in ("op", "block", "model"):
        own = [c for c in listed.values() if c.level == level and c.ours]
        assert {c.mechanism for c in own} == {"lastk", "favor", "nsa"}
        assert all(set(c.phases) == {"fwd", "bwd", "decode"} for c in own)
    for contender in listed.values():
        if contender.mechanism != "dense":
            assert listed[contender.partner].mechanism == "dense"
    libraries = {contender.library for contender in listed.values()}
    assert {"performer-pytorch", "flash-linear-attention", "native-sparse-attention-pytorch"} < (
        libraries
    )
    assert {"sdpa-flash", "sdpa-efficient", "sdpa-cudnn", "sdpa-math", "flex-causal"} < set(listed)


def attention(q, k, v, causal=True):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)


@pytest.mark.parametrize("n", [1, 2, 5, 64, 65, 300, 4096])
def test_sampled_rows_are_runs_that_hold_both_ends_and_a_tiles_edge(n):
    runs = sampled_runs(n)
    rows = [i for first, end in runs for i in range(first, end)]
    assert rows == sorted(set(rows)) and rows[0] == 0 and rows[-1] == n - 1
    assert all(first < end <= n for first, end in runs)
    assert all(end < first for (_, end), (first, _) in itertools.pairwise(runs))
    if n > 66:
        assert {63, 64} <= set(rows)
    assert len(rows) <= 15


@pytest.mark.parametrize("phase", ["fwd", "bwd", "decode"])
@pytest.mark.parametrize("name", ["lastk", "nsa"])
def test_a_block_with_wrong_attention_does_not_pass(name, phase, monkeypatch):
    """The same error in every precision, as a bug has: only the definition can tell."""
    from attnopt.kernels.lastk import eager
    from attnopt.kernels.nsa import eager_compressed

    module = {"lastk": eager, "nsa": eager_compressed}[name]
    function = {"lastk": "lastk_forward", "nsa": "compressed_forward"}[name]
    right = getattr(module, function)

    def wrong(*args, **kwargs):
        out, *rest = right(*args, **kwargs)
        return out * 1.001, *rest

    prepared = find(f"block-{name}").prepare(phase, Shape(1, 2, 16, 512), torch.float32, CPU)
    errors = prepared.check()
    assert all(error <= prepared.limit for error in errors.values()), errors
    monkeypatch.setattr(module, function, wrong)
    prepared.call()
    assert not all(error <= prepared.limit for error in prepared.check().values())


@pytest.mark.parametrize("phase", ["fwd", "bwd"])
@pytest.mark.parametrize("fault", ["none", "sees the future", "last row", "gradient", "nan"])
def test_a_wrong_contender_does_not_pass(fault, phase):
    generator = torch.Generator().manual_seed(0)
    tensors = {x: torch.randn(1, 2, 96, 16, generator=generator) for x in ("q", "k", "v", "grad")}

    def attend(given):
        q, k, v = (given[name] for name in "qkv")
        if fault == "gradient":
            k = k.detach() + 0.99 * (k - k.detach())
        out = attention(q, k, v, causal=fault != "sees the future")
        if fault == "last row":
            out = out * torch.where(torch.arange(96) == 95, 1.01, 1.0)[:, None]
        if fault == "nan":  # in a row that the check does not sample
            free = next(i for i in range(96) if not any(i in range(*r) for r in sampled_runs(96)))
            out = torch.where((torch.arange(96) == free)[:, None], torch.nan, out)
        return out

    prepared = prepare_op(attend, softmax_rows, tensors, phase, Work(1.0, 1.0))
    errors = prepared.check().values()
    right = all(error <= prepared.limit for error in errors)
    assert right == (fault == "none" or (fault == "gradient" and phase == "fwd"))


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="contenders are sdpa-flash, .*; got 'performer'"):
        find("performer")
    with pytest.raises(ValueError, match="levels are op, layer, block, model; got head"):
        contenders(["head"])
