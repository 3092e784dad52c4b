"""Attention configs: what they accept, what they refuse, and their way through JSON."""

import json
import subprocess
import sys
from dataclasses import FrozenInstanceError

import pytest

from attnopt.config import (
    BACKENDS,
    Every,
    First,
    LastK,
    Masks,
    NthLast,
    Window,
    config_from_dict,
)
from attnopt.kernels import dispatch

CONFIGS = [
    LastK(),
    LastK(window=1024, sinks=4, per_head=True, init="random", backend="eager"),
    Masks(),
    Masks([Window(8), First(4), NthLast(0)], per_head=True, init="random", backend="reference"),
    Masks([Every(), First(1)]),
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
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError) as error:
        make()
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "mechanism must be one of lastk, masks; got None"),
        ({"mechanism": "softmax"}, "mechanism must be one of lastk, masks; got 'softmax'"),
        ({"mechanism": "lastk", "size": 3}, "lastk has the fields window, sinks"),
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
    code = "import sys, attnopt.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_configs_and_kernels_name_the_same_backends():
    """The configs import no torch, so they hold a list of their own."""
    assert BACKENDS == dispatch.BACKENDS
