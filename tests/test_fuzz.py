"""Random calls: the right answer or a clear error, never NaN, never a crash.

200 cases in the default run, always the same ones; 2,000 in the nightly one, new ones every time.
"""

import json

import pytest
import torch
from fuzz_calls import STEADY, Call, selections, spoiled_calls, valid_calls
from fuzz_configs import config_arguments
from hypothesis import HealthCheck, event, given, settings

from attnopt.attention import build_mechanism, config_from_dict

# What an output may lack against the definition in float64, relative to its largest number.
LIMITS = {torch.float64: 1e-9, torch.float32: 2e-4, torch.float16: 8e-3, torch.bfloat16: 6e-2}
NIGHTLY = 10  # times as many


def cases(count, **kwargs):
    """Run a check on `count` random examples by default, and a nightly twin on ten times more."""

    def decorate(check):
        given_check = given(**kwargs)(check)
        quiet = {"deadline": None, "suppress_health_check": list(HealthCheck)}
        default = settings(max_examples=count, derandomize=True, **quiet)(given_check)
        nightly = settings(max_examples=NIGHTLY * count, **quiet)(given(**kwargs)(check))
        return default, pytest.mark.slow(nightly)

    return decorate


def natural_size(call):
    """Size of what a gradient is the difference of: at most so much of it can cancel."""
    q, k, v = (call.tensors[name].double().abs().max() for name in "qkv")
    return 0.1 * v * max(1.0, q, k)


def assert_close(name, ours, right, limit, size=1e-3):
    assert ours is not None, f"{name} has no gradient"
    assert ours.shape == right.shape
    if right.numel() == 0:
        return
    assert ours.isfinite().all(), f"{name} is not finite"
    scale = right.abs().max().clamp_min(size)
    worst = ((ours.double() - right).abs().max() / scale).item()
    assert worst <= limit, f"{name} is off by {worst:.1e}, allowed are {limit:.0e}"


def check_valid(call: Call):
    dtype = call.tensors["q"].dtype
    event(f"{call.op} {dtype}")
    out, grads = call.run()
    assert out.shape == call.tensors["q"].shape and out.dtype == dtype
    assert out.isfinite().all(), "the output is not finite"
    for name, grad in grads.items():
        assert grad is None or grad.isfinite().all(), f"the gradient of {name} is not finite"
    chosen = [selections(call, precision) for precision in (dtype, torch.float64)]
    flipped = not all(map(torch.equal, *chosen))
    if call.spread > STEADY or flipped:
        return
    right, right_grads = call.define()
    assert_close("out", out, right, LIMITS[dtype])
    if dtype.itemsize == 2 and call.options.get("feature_map") in ("relu", "taylor"):
        return  # weights that may nearly vanish divide the rounding of the output
    for name, expected in right_grads.items():
        limit = max(LIMITS[dtype], LIMITS[call.tensors[name].dtype])
        assert_close(f"d{name}", grads[name], expected, 3 * limit, natural_size(call))


def check_spoiled(call: Call):
    event(f"{call.op} {call.spoiled}")
    try:
        out = call.function(**call.tensors, **call.options)
    except ValueError as error:
        message = str(error)
        assert "got" in message or call.spoiled in message, f"says not what is wrong: {message}"
        return
    assert isinstance(out, torch.Tensor) and out.shape == call.tensors["q"].shape
    assert out.device.type == "meta" or out.isfinite().all()


def check_config(arguments):
    """Any values make a config that works, or a clear error; a config travels as JSON."""
    cls, values, sizes, seed = arguments
    try:
        config = cls(**values)
    except ValueError as error:
        assert "got" in str(error) or any(name in str(error) for name in values), error
        return
    assert config_from_dict(json.loads(json.dumps(config.to_dict()))) == config
    rng = torch.Generator().manual_seed(seed)
    heads, kv_heads, dim, length, causal = sizes
    shape = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": dim}
    try:
        mechanism = build_mechanism(
            config, **shape, hidden_size=heads * dim, layer_idx=0, causal=causal
        )
    except ValueError as error:
        assert cls.__name__ in str(error) or "got" in str(error), error
        return
    event(cls.__name__)
    q = torch.randn(2, heads, length, dim, generator=rng, requires_grad=True)
    k, v = (torch.randn(2, kv_heads, length, dim, generator=rng) for _ in range(2))
    hidden = torch.randn(2, length, heads * dim, generator=rng)
    mask = torch.arange(length) >= torch.tensor([[0], [length // 2]])
    try:
        out = mechanism(q, k, v, key_mask=mask, hidden_states=hidden)
    except ValueError as error:  # an explicit backend that this machine lacks, a text too long
        assert "got" in str(error), error
        return
    out.square().sum().backward()
    assert out.shape == q.shape and out.isfinite().all() and q.grad.isfinite().all()
    for name, parameter in mechanism.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


test_configs, test_configs_nightly = cases(50, arguments=config_arguments())(check_config)
test_valid_calls, test_valid_calls_nightly = cases(80, call=valid_calls())(check_valid)
test_spoiled_calls, test_spoiled_calls_nightly = cases(70, call=spoiled_calls())(check_spoiled)
