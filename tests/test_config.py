"""Attention configs: what they accept, what they refuse, and their way through JSON."""

import json
import subprocess
import sys
from dataclasses import FrozenInstanceError

import pytest

from attnopt.attention import (
    NSA,
    Every,
    Favor,
    First,
    LastK,
    Masks,
    NthLast,
    Window,
    config_from_dict,
)
from attnopt.attention.config import BACKENDS
from attnopt.attention.favor.config import FEATURE_MAPS, MAX_BLOCK, NORMS, STABILIZERS
from attnopt.attention.nsa.compressors import COMPRESSORS
from attnopt.attention.nsa.config import COMBINES, COMPRESSIONS, REGIMES
from attnopt.kernels import dispatch
from attnopt.kernels.favor import arguments, projections
from attnopt.kernels.nsa import arguments as nsa_arguments

CONFIGS = [
    LastK(),
    LastK(window=1024, sinks=4, per_head=True, init="random", backend="eager"),
    Masks(),
    Masks([Window(8), First(4), NthLast(0)], per_head=True, init="random", backend="reference"),
    Masks([Every(), First(1)]),
    Favor(),
    Favor(64, window=33, window_block=16, norms="constant", gate=True, seed=7, backend="triton"),
    Favor(feature_map="hedgehog", window=33),
    Favor(32, feature_map="exp", stabilizer="static"),
    Favor(feature_map="taylor", window=16, gate=False, backend="eager"),
    Favor(16, learned=True),
    NSA(),
    NSA(select_block=16, num_selected=2, window=33, compression="mlp", backend="triton"),
    NSA("gates", 64, 32, 16, 16, 512, 1, 2, "weighted", regime="long", backend="eager"),
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_survives_json(config):
    data = json.loads(json.dumps(config.to_dict()))
    assert config_from_dict(data) == config
    assert data["mechanism"] == type(config).mechanism


def test_default_masks_are_the_last_five_tokens():
    assert Masks().candidates == tuple(NthLast(n) for n in range(5))


def test_is_a_value():
    assert len({LastK(), LastK(5), Masks([NthLast(0)]), Masks((NthLast(0),))}) == 2
    with pytest.raises(FrozenInstanceError):
        LastK().window = 6


def test_favor_fills_in_what_is_left_out():
    def filled(config):
        return config.num_features, config.learned, config.gate

    assert filled(Favor()) == (128, False, False)
    assert filled(Favor(window=33)) == (128, False, False)
    assert filled(Favor(feature_map="relu", window=1)) == (128, False, True)
    assert filled(Favor(feature_map="exp")) == (128, True, False)
    assert filled(Favor(feature_map="hedgehog")) == (None, True, False)
    assert filled(Favor(feature_map="hedgehog", window=33)) == (None, True, True)
    assert filled(Favor(feature_map="taylor", window=33)) == (None, False, True)
    assert Favor(feature_map="taylor", window=33, gate=False) != Favor(
        feature_map="taylor", window=33
    )


def test_nsa_fills_in_what_is_left_out():
    def filled(config):
        sizes = config.compress_block, config.compress_stride
        return *sizes, config.sink_blocks, config.local_blocks

    assert filled(NSA()) == (32, 32, 0, None)
    assert filled(NSA(select_block=5, sink_blocks=1)) == (5, 5, 1, None)
    assert filled(NSA("gates")) == (32, 16, 1, 2)
    assert filled(NSA("gates", select_block=5)) == (5, 5, 1, 2)
    assert filled(NSA("gates", compress_block=8)) == (8, 4, 1, 2)
    assert filled(NSA("gates", compress_stride=8, sink_blocks=0, local_blocks=1)) == (32, 8, 0, 1)
    assert NSA() == NSA(compress_block=32, compress_stride=32, sink_blocks=0)
    assert [NSA().gate, NSA("gates").gate] == [False, True]


def test_dense_sets_are_those_with_every():
    assert Masks([NthLast(1), Every()]).dense
    assert not Masks([Window(1024), First(9)]).dense


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LastK(window=0), "window must be an integer >= 1; got 0"),
        (lambda: LastK(window=-3), "window must be an integer >= 1; got -3"),
        (lambda: LastK(window=2.0), "window must be an integer >= 1; got 2.0"),
        (lambda: LastK(window=True), "window must be an integer >= 1; got True"),
        (lambda: LastK(sinks=-1), "sinks must be an integer >= 0; got -1"),
        (lambda: LastK(per_head=1), "per_head must be True or False; got 1"),
        (lambda: LastK(init="ones"), "init must be one of zeros, random; got 'ones'"),
        (lambda: LastK(backend="cuda"), "backend must be one of auto, triton, eager, reference"),
        (lambda: NthLast(-1), "n of NthLast must be an integer >= 0; got -1"),
        (lambda: Window(0), "size of Window must be an integer >= 1; got 0"),
        (lambda: First(0), "count of First must be an integer >= 1; got 0"),
        (lambda: Masks([]), "at least one of NthLast, Window, First, Every; got none"),
        (lambda: Masks(3), "must be a list of NthLast, Window, First, Every; got 3"),
        (lambda: Masks([LastK()]), "must be one of NthLast, Window, First, Every; got LastK"),
        (lambda: Masks([Window(2), Window(2)]), "every candidate may occur once"),
        (lambda: Masks(init=None), "init must be one of zeros, random; got None"),
        (lambda: Masks(per_head="yes"), "per_head must be True or False; got 'yes'"),
        (lambda: Masks([Every()], backend="triton"), "backend must be one of auto; got 'triton'"),
        (lambda: Favor(0), "num_features must be an integer >= 1; got 0"),
        (lambda: Favor(64.0), "num_features must be an integer >= 1; got 64.0"),
        (lambda: Favor(feature_map="elu"), "one of favor, hedgehog, exp, relu, taylor; got 'elu'"),
        (lambda: Favor(7, feature_map="hedgehog"), "must be even (rows w and -w); got 7"),
        (lambda: Favor(8, feature_map="taylor"), "leave out num_features; got 8"),
        (lambda: Favor(feature_map="taylor", learned=True), "has no projection to learn"),
        (lambda: Favor(feature_map="hedgehog", learned=False), "'hedgehog' is always learned"),
        (lambda: Favor(feature_map="exp", learned=False), "'exp' is always learned"),
        (lambda: Favor(learned=1), "learned must be True or False; got 1"),
        (lambda: Favor(window=-1), "window must be an integer >= 0; got -1"),
        (lambda: Favor(window=None), "window must be an integer >= 0; got None"),
        (lambda: Favor(window_block=0), "window_block must be an integer >= 1; got 0"),
        (lambda: Favor(window_block=129), "window_block must be at most 128; got 129"),
        (lambda: Favor(norms="unit"), "norms must be one of chi, constant; got 'unit'"),
        (lambda: Favor(feature_map="taylor", norms="constant"), "leave out norms; got"),
        (lambda: Favor(feature_map="taylor", seed=3), "leave out seed; got 3"),
        (lambda: Favor(seed=-1), "seed must be an integer >= 0; got -1"),
        (lambda: Favor(gate=True), "gate=True needs a window"),
        (lambda: Favor(gate="yes", window=1), "gate must be True or False; got 'yes'"),
        (lambda: Favor(stabilizer="max"), "must be one of running, static; got 'max'"),
        (lambda: Favor(backend="cuda"), "backend must be one of auto, triton, eager, reference"),
        (
            lambda: Favor(feature_map="relu", backend="triton"),
            "backend must be one of auto, eager, reference; got 'triton'",
        ),
        (lambda: NSA("sum"), "combine must be one of merged, gates; got 'sum'"),
        (lambda: NSA(select_block=0), "select_block must be an integer >= 1; got 0"),
        (lambda: NSA("gates", select_block=8.0), "select_block must be an integer >= 1; got 8.0"),
        (lambda: NSA("gates", compress_block=0), "compress_block must be an integer >= 1; got 0"),
        (lambda: NSA("gates", compress_stride=-1), "compress_stride must be an integer >= 1"),
        (lambda: NSA("gates", compress_stride=33), "compress_stride must be at most 32, a block"),
        (lambda: NSA(compress_block=16), "must be select_block, 32; got 16 and 16"),
        (lambda: NSA(compress_stride=16), "must be select_block, 32; got 32 and 16"),
        (lambda: NSA(local_blocks=0), "combine='merged' has no local_blocks; got 0"),
        (lambda: NSA(num_selected=-1), "num_selected must be an integer >= 0; got -1"),
        (lambda: NSA("gates", num_selected=0), "num_selected must be an integer >= 1; got 0"),
        (lambda: NSA(num_selected=1, sink_blocks=2), "counts 2 forced blocks; got 1"),
        (lambda: NSA("gates", num_selected=2), "counts 3 forced blocks; got 2"),
        (lambda: NSA(window=0), "window must be an integer >= 1; got 0"),
        (lambda: NSA(sink_blocks=-1), "sink_blocks must be an integer >= 0; got -1"),
        (lambda: NSA("gates", local_blocks=True), "local_blocks must be an integer >= 0"),
        (lambda: NSA(compression="max"), "compression must be one of mean, weighted, mlp; got"),
        (lambda: NSA(regime="wide"), "regime must be one of auto, short, long; got 'wide'"),
        (lambda: NSA(backend="cuda"), "backend must be one of auto, triton, eager, reference"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError) as error:
        make()
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "mechanism must be one of lastk, masks, favor, nsa, .*; got None"),
        ({"mechanism": "softmax"}, "mechanism must be one of .*; got 'softmax'"),
        ({"mechanism": "lastk", "size": 3}, "lastk has the fields window, sinks"),
        ({"mechanism": "favor", "features": 3}, "favor has the fields num_features, feature_map"),
        ({"mechanism": "nsa", "size": 3}, "nsa has the fields combine, select_block"),
        ({"mechanism": "lastk", "window": 0}, "window must be an integer >= 1"),
        (
            {"mechanism": "masks", "candidates": [{"candidate": "last"}]},
            "candidate must be one of nth_last, window, first, every; got 'last'",
        ),
        (
            {"mechanism": "masks", "candidates": [{"candidate": "window"}]},
            "window needs the fields size",
        ),
    ],
)
def test_refuses_to_read(data, message):
    with pytest.raises(ValueError, match=message):
        config_from_dict(data)


def test_needs_no_torch():
    code = "import sys, attnopt.attention; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_configs_and_kernels_name_the_same_choices():
    """The configs import no torch, so they hold lists of their own."""
    assert BACKENDS == dispatch.BACKENDS
    assert FEATURE_MAPS == arguments.FEATURE_MAPS
    assert STABILIZERS == arguments.STABILIZERS
    assert MAX_BLOCK == arguments.MAX_BLOCK
    assert NORMS == projections.NORMS
    assert COMBINES == nsa_arguments.COMBINES
    assert REGIMES == nsa_arguments.REGIMES
    assert COMPRESSIONS == tuple(COMPRESSORS)
