"""The least work of each op: what its definition makes any implementation compute and move.

FLOPs count matrix products only, a multiply-add as two. Bytes count every input once and every
output once, however often an implementation comes back to them. Phases:

    fwd      the inputs are read, the output is written
    bwd      forward and backward: fwd, with the log-sum-exp of each row (fp32) written too; then
             the inputs, the output, its gradient and the log-sum-exp are read and the gradients of
             q, k, v (and of compressed keys, values and gates) written
    decode   one step, Nq = 1, Nk tokens so far: the cache or the state is read once

A product of queries with keys counts 2 D per visible pair. Forward has two (scores, output),
backward five (scores again, dP, dq, dk, dv): 2.5 times forward, so that "bwd" is 3.5 times "fwd".

Letters: B batch, H query heads, Hkv key/value heads, Nq queries, Nk keys (the queries are the last
Nq), D head dim, W window, T sinks, M features, P compressed blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

PHASES = ("fwd", "bwd", "decode")
_FP32 = 4  # bytes of log-sum-exp, weights, projection and state


@dataclass(frozen=True)
class Work:
    """Work of one call.

    Attributes:
        flops: of matrix products.
        bytes: read and written.
    """

    flops: float
    bytes: float


def dense(
    phase: str, B: int, H: int, Hkv: int, Nq: int, Nk: int, D: int, itemsize: int,
    causal: bool = True,
) -> Work:
    """Softmax attention over every key, or every earlier one.

    Forward FLOPs are `4 D B H pairs`, with `pairs = sum_i (Nk - Nq + i + 1)` if causal, else
    `Nq Nk`. Bytes are q, k, v and the output; in a step of decoding k and v are the cache.
    """
    pairs = int((_positions(Nq, Nk) + 1).sum()) if causal else Nq * Nk
    tensors = _Tensors(B, H, Nq, 2 * Hkv * Nk, D, itemsize)
    return Work(_attention_flops(phase, B * H * D * pairs), tensors.bytes(phase))


def lastk(
    phase: str, B: int, H: int, Hkv: int, Nq: int, Nk: int, D: int, itemsize: int, W: int,
    T: int = 0,
) -> Work:
    """Last-k masks: the last W tokens and the first T.

    As `dense` with `pairs = sum_p min(p + 1, W + T)` over the positions p of the queries; the
    weights `[H, W + T]` in fp32 are read, and their gradient is written. Decoding reads W + T
    entries of the cache.
    """
    pairs = int(np.minimum(_positions(Nq, Nk) + 1, W + T).sum())
    keys = min(Nk, W + T) if phase == "decode" else Nk
    tensors = _Tensors(B, H, Nq, 2 * Hkv * keys, D, itemsize, shared=_FP32 * H * (W + T))
    weights = _FP32 * H * (W + T) if phase == "bwd" else 0
    return Work(_attention_flops(phase, B * H * D * pairs), tensors.bytes(phase) + weights)


def favor(
    phase: str, B: int, H: int, Hkv: int, Nq: int, Nk: int, D: int, itemsize: int, M: int,
    window: int = 0, window_block: int = 32,
) -> Work:
    """Attention through M positive features of a fixed projection, with an exact window.

    In units of `2 M D B H` the features cost Nq + Nk, the state Nk and the output Nq: `4 N` forward
    for N = Nq = Nk, less what a window keeps from the features. Backward makes the features (2 N)
    and the state (N) again and adds its adjoint, both gradients of logarithms, dv, dq and dk: 9 N.
    The window, with its near pairs, counts as attention. Bytes are q, k, v, the output and the
    projection `[H, M, D]` in fp32.

    A step of decoding costs `4` units; it reads and writes the state, `M (D + 2)` numbers in fp32
    per head, and reads the keys and values of the window.
    """
    p = _positions(Nq, Nk)
    near = _near_tokens(p, window, window_block) if window else np.zeros(1)
    far = p + 1 - near if window else p + 1  # keys that a query sees through features
    seen = int(np.count_nonzero(far)) + int(far.max())  # queries with such keys, and these keys
    unit = 2 * M * D * B * H
    units = {"fwd": 2 * seen, "bwd": 6.5 * seen, "decode": 4}[_known(phase)]
    flops = unit * units + _attention_flops(phase, B * H * D * int(near.sum()))
    keys, state = 2 * Hkv * Nk, 0
    if phase == "decode":
        keys = 2 * Hkv * max(1, int(near.sum()))  # the new token at least
        state = 2 * _FP32 * B * H * M * (D + 2)
    projection = _FP32 * H * M * D
    tensors = _Tensors(B, H, Nq, keys, D, itemsize, shared=projection)
    return Work(flops, tensors.bytes(phase) + state)


def nsa(
    phase: str, B: int, H: int, Hkv: int, Nq: int, Nk: int, D: int, itemsize: int, block: int,
    stride: int, select_block: int, num_selected: int, window: int, combine: str,
    local_blocks: int = 2,
) -> Work:
    """Compressed blocks, selected blocks and recent tokens.

    Per query at position p, with `pairs` the number of keys of a branch:

        gates    compressed (p + 1 - block) // stride + 1,
                 selected min(p + 1, (S - 1) b + p % b + 1), recent min(p + 1, W)
        merged   near blocks of the window from w0 = max(0, p - W + 1) // b on, min(S, w0) selected
                 blocks of b tokens, and the w0 less these compressed; the scores of all w0 rank

    all as attention, `4 D` forward per pair; "merged" adds `2 D` for the scores of the selected
    blocks that only rank. Bytes: keys and values once each, however many queries gather them, their
    compressed blocks, and the gates; a log-sum-exp per softmax. The selection itself is free. A
    step of decoding reads the compressed blocks, the selected ones and the recent tokens.
    """
    p, b, S = _positions(Nq, Nk), select_block, num_selected
    blocks = max(0, (Nk - block) // stride + 1)
    gates = combine == "gates"
    if gates:
        compressed = np.maximum(0, (p + 1 - block) // stride + 1)
        selected = np.minimum(p + 1, (S - 1) * b + p % b + 1)
        pairs = compressed + selected + np.minimum(p + 1, window)
        ranked, far = np.zeros(1), S - local_blocks
        near = np.maximum(np.minimum(p + 1, window), np.minimum(p + 1, local_blocks * b))
    elif combine == "merged":
        before = np.maximum(0, p - window + 1) // b
        near, ranked, far = p - before * b + 1, np.minimum(S, before), S
        pairs = near + ranked * b + before - ranked
    else:
        raise ValueError(f"combine must be 'merged' or 'gates'; got {combine!r}")
    ranking = 2 * D * B * H * int(ranked.sum())
    flops = _attention_flops(phase, B * H * D * int(pairs.sum())) + ranking
    keys = min(Nk, int(near.max()) + far * b) if phase == "decode" else Nk
    row = 3 * itemsize * B * H * Nq if gates else 0  # gates, or their gradient
    tensors = _Tensors(B, H, Nq, 2 * Hkv * (keys + blocks), D, itemsize, row, 3 if gates else 1)
    return Work(flops, tensors.bytes(phase) + (row if phase == "bwd" else 0))


@dataclass(frozen=True)
class _Tensors:
    """Sizes of a call: `keys` counts rows of keys and values, `shared` bytes read by each pass."""

    B: int
    H: int
    Nq: int
    keys: int
    D: int
    itemsize: int
    shared: int = 0
    softmaxes: int = 1

    def bytes(self, phase: str) -> float:
        """Bytes of a phase, without what only one op has."""
        out = self.B * self.H * self.Nq * self.D * self.itemsize  # q has the same size
        keys = self.B * self.keys * self.D * self.itemsize
        forward = 2 * out + keys + self.shared
        if _known(phase) != "bwd":
            return forward
        lse = self.softmaxes * _FP32 * self.B * self.H * self.Nq
        read = 3 * out + keys + self.shared + lse  # q, the output and its gradient
        return forward + lse + read + out + keys


def _attention_flops(phase: str, unit: int) -> float:
    """FLOPs of attention whose pairs times B H D are `unit`."""
    return 4.0 * unit * (3.5 if _known(phase) == "bwd" else 1.0)


def _positions(Nq: int, Nk: int) -> np.ndarray:
    """Positions of the queries, the last Nq of Nk tokens."""
    return np.arange(Nk - Nq, Nk)


def _near_tokens(p: np.ndarray, window: int, block: int) -> np.ndarray:
    """Tokens that queries at positions p see exactly: whole blocks back to the window's first."""
    return p + 1 - np.maximum(0, p - window + 1) // block * block


def _known(phase: str) -> str:
    if phase not in PHASES:
        raise ValueError(f"phase must be one of {', '.join(PHASES)}; got {phase!r}")
    return phase
