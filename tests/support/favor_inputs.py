"""Inputs of FAVOR+ attention for tests, and the results to compare: values and every gradient."""

import torch
from attention_inputs import BACKENDS, DEVICE, launching, make_mask, make_qkv
from torch import Tensor

from attnopt.kernels.favor import FavorState, favor_attention
from attnopt.kernels.favor.reference import favor_reference

MAPS = ["favor", "hedgehog", "exp", "relu", "taylor"]
PAIRS = [(backend, name) for backend in BACKENDS for name in MAPS[: 5 - 2 * (backend == "triton")]]
FLOATS = (
    "q", "k", "v", "projection", "log_gate", "kv", "z", "ring_keys", "ring_values",
)  # fmt: skip


def make_state(feature_map, b, h, hkv, m, d, window, block, mask, rand) -> dict[str, Tensor]:
    """Sums of positive weights and, with a window, a ring whose first tokens are summed up."""
    wide = torch.promote_types(rand(1).dtype, torch.float32)
    kv, z, log_scale = (rand(*size).to(wide) for size in [(b, h, m, d), (b, h, m), (b, h, m)])
    z = z.abs() + 0.5
    if feature_map == "taylor":  # features may be negative, the sum of weights must not
        z[:, :, 0] += 1000
        log_scale *= 0
    state = {"kv": kv, "z": z, "log_scale": log_scale}
    if window:
        size = window + block - 2
        real = torch.arange(size) >= (torch.arange(b)[:, None] * 5 + 3).clamp(max=size - 1)
        real[0] &= mask != "empty-row"
        keys, values = rand(2, b, hkv, size, d).unbind()
        state |= {"ring_keys": keys, "ring_values": values, "ring_mask": real.to(DEVICE)}
    return state


def make_inputs(
    *, feature_map="favor", n=100, extra=0, d=20, m=12, h=2, hkv=1, b=2, mask="none",
    layout="bhnd", window=0, block=32, state=False, gate=False, shared=False, std=1.0,
    dtype=torch.float32, seed=0,
) -> dict:  # fmt: skip
    """Tensors of a call by name, all rounded to dtype (sums and gate are at least float32).

    n queries and n + extra keys, of which q and k are scaled by `std`. `shared`: one projection.
    """
    rng = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:  # quantized to dtype
        return torch.randn(shape, generator=rng, dtype=torch.float64).to(DEVICE, dtype)

    q, k, v = make_qkv(layout, b, h, hkv, n, n + extra, d, rand)
    inputs = {"q": std * q, "k": std * k, "v": v} if std != 1 else {"q": q, "k": k, "v": v}
    taylor = feature_map == "taylor"
    if not taylor:
        rows = rand(m, d) if shared else rand(h, m, d)
        if layout == "broadcast" and not shared:
            rows = rand(1, m, d).expand(h, -1, -1)
        inputs["projection"] = rows
    if gate and window:
        inputs["log_gate"] = rand(h).to(torch.promote_types(dtype, torch.float32))
    if state:
        count = 1 + d + d * (d + 1) // 2 if taylor else m
        inputs |= make_state(feature_map, b, h, hkv, count, d, window, block, mask, rand)
    key_mask = make_mask(mask, b, n + extra, rng)
    return inputs | {"key_mask": None if key_mask is None else key_mask.to(DEVICE)}


def make_options(sizes: dict, **others) -> dict:
    """What `favor_attention` takes beside tensors, from the arguments of `make_inputs`."""
    options = {
        "feature_map": sizes.get("feature_map", "favor"),
        "window": sizes.get("window", 0),
        "window_block": sizes.get("block", 32),
    }
    return options | others


def as_float64(inputs: dict) -> dict:
    """The same numbers in float64."""
    names = (*FLOATS, "log_scale")
    return {name: x.double() if name in names else x for name, x in inputs.items()}


def attend(inputs: dict, options: dict, backend: str) -> tuple[Tensor, FavorState]:
    """The public function, with the state put together."""
    state = None
    if "kv" in inputs:
        names = ("kv", "z", "log_scale", "ring_keys", "ring_values", "ring_mask")
        state = FavorState(*(inputs.get(name) for name in names))
    return favor_attention(
        inputs["q"], inputs["k"], inputs["v"], inputs.get("projection"),
        log_gate=inputs.get("log_gate"), key_mask=inputs["key_mask"], initial_state=state,
        return_state=True, backend=backend, **options,
    )  # fmt: skip


def define(inputs: dict, options: dict) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """The definition; a ring's tokens stand before the keys.

    With a window and a state, queries before the first real token of both see nothing.
    """
    k, v, key_mask = inputs["k"], inputs["v"], inputs["key_mask"]
    if "ring_keys" in inputs:
        if key_mask is None:
            key_mask = torch.ones(k.shape[0], k.shape[2], device=k.device).bool()
        k, v = torch.cat([inputs["ring_keys"], k], 2), torch.cat([inputs["ring_values"], v], 2)
        key_mask = torch.cat([inputs["ring_mask"], key_mask], 1)
    options = {name: x for name, x in options.items() if name != "stabilizer"}
    state = tuple(inputs[name] for name in ("kv", "z", "log_scale")) if "kv" in inputs else None
    out, sums = favor_reference(
        inputs["q"], k, v, inputs.get("projection"), log_gate=inputs.get("log_gate"),
        key_mask=key_mask, initial_state=state, return_state=True, **options,
    )  # fmt: skip
    if "ring_keys" in inputs:
        begun = key_mask.cumsum(1)[:, k.shape[2] - out.shape[2] :] > 0
        out = out * begun[:, None, :, None]
    return out, sums


def upstream(inputs: dict, features: int, seed: int = 1) -> list[Tensor]:
    """Random gradients: of the output, strided as a model's [B, N, H * D], and of the sums."""
    b, h, n, d = inputs["q"].shape
    rng = torch.Generator().manual_seed(seed)
    sizes = [(b, n, h, d), (b, h, features, d), (b, h, features)]
    grad, *sums = (torch.randn(size, generator=rng, dtype=torch.float64) for size in sizes)
    wide = torch.promote_types(inputs["q"].dtype, torch.float32)
    return [grad.to(inputs["q"]).transpose(1, 2), *(x.to(DEVICE, wide) for x in sums)]


def run(function, inputs: dict, options: dict, log_scale: Tensor | None = None,
        only: tuple[str, ...] = FLOATS) -> dict[str, Tensor]:  # fmt: skip
    """Output, sums of the next state at the given scale, and the gradient of every input.

    Without a scale the sums stand at their own, which becomes the result "log_scale".
    """
    leaves = {
        name: inputs[name].detach().requires_grad_() for name in FLOATS
        if name in inputs and name in only
    }  # fmt: skip
    out, state = function(inputs | leaves, options)
    kv, z, own = state[:3]
    log_scale = own if log_scale is None else log_scale
    factor = torch.where(z == 0, 0, (own.double() - log_scale).exp()).to(own).detach()
    values = [out, kv * factor.unsqueeze(-1), z * factor]
    grads = torch.autograd.grad(
        values, [*leaves.values()], upstream(inputs, z.shape[-1]), allow_unused=True
    )
    results = {name: x.detach() for name, x in zip(["out", "kv'", "z'"], values, strict=True)}
    for (name, x), grad in zip(leaves.items(), grads, strict=True):
        results[name] = torch.zeros_like(x) if grad is None else grad
        assert (results[name].shape, results[name].dtype) == (x.shape, x.dtype)
    assert (out.shape, out.dtype) == (inputs["q"].shape, inputs["q"].dtype)
    return results | {"log_scale": log_scale}


def run_backend(backend: str, inputs: dict, options: dict, *rest, **more) -> dict[str, Tensor]:
    """`run` through the public function."""
    with launching(backend):
        return run(lambda x, o: attend(x, o, backend), inputs, options, *rest, **more)


def run_exact(inputs: dict, options: dict) -> dict[str, Tensor]:
    """`run` through the definition in float64."""
    return run(define, as_float64(inputs), options)


def error(actual: Tensor, exact: Tensor, floor: float = 1e-30) -> float:
    """Frobenius norm of the error over that of the exact tensor, or over a floor for it."""
    return float((actual.double() - exact).norm() / exact.norm().clamp(min=floor))
