"""Device functions of the FAVOR+ kernels: features in logarithms, their running reference, sums.

All logarithms are to the base 2. Keys come transposed, features as rows, so that sums over tokens
are products of what is already in registers. Letters: C tokens of a tile, F features, M of them
real, COLS columns of the head dimension.

    lq_m = log2(e) (w_m.q' + g) [- norm]     lk_m = log2(e) w_m.k' - norm
    norm = log2(e) |x'|^2 / 2 (favor), log2 sum_m 2^{..} (hedgehog), 0 (exp)

A reference r_m is an integer, so that scaling by 2^{r - r'} is exact. It lies HEADROOM below the
largest logarithm it has seen: in the same block as a large key, earlier rows need what is far
smaller. What lies more than CLAMP below the reference counts as that: a weight is never 0.
"""

import triton
import triton.language as tl

from attnopt.kernels.common import LN2, LOG2E, load_rows

EMPTY = tl.constexpr(-1e30)
HEADROOM = tl.constexpr(60.0)
CLAMP = tl.constexpr(110.0)
CEILING = tl.constexpr(100.0)  # leaves room for a sum over 2^20 keys
LOG2E_COARSE = tl.constexpr(369 / 256)  # nine bits of log2(e)
LOG2E_FINE = tl.constexpr(1.4426950408889634 - 369 / 256)


@triton.jit
def load_tile(ptr, strides, row0, valid, ROWS: tl.constexpr, COLS: tl.constexpr,
              DIM: tl.constexpr):
    """Rows of q, k, v or dO as operands: fp16 becomes fp32, for features need its exponents."""
    tile = load_rows(ptr, strides, row0, valid, ROWS, COLS, DIM)
    if tile.dtype == tl.float16:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def load_projection(w_ptr, M, DIM: tl.constexpr, COLS: tl.constexpr, F: tl.constexpr):
    """W `[F, COLS]` of a head, zero beyond its M rows; `w_ptr` is contiguous."""
    m0 = tl.program_id(0) * 0
    return load_tile(w_ptr, (DIM, 1), m0, tl.arange(0, F) < M, F, COLS, DIM)


@triton.jit
def log_sum_exp(x, AXIS: tl.constexpr):
    """`log2 sum 2^x` along an axis."""
    top = tl.max(x, AXIS)
    return top + tl.log2(tl.sum(tl.exp2(x - tl.expand_dims(top, AXIS)), AXIS))


@triton.jit
def query_logits(q, w, gate, scale, M, FEATURES: tl.constexpr, NEAR: tl.constexpr,
                 PRECISION: tl.constexpr):
    """lq `[C, F]`, -inf beyond M; the norm and the gate only matter beside an exact window."""
    real = (tl.arange(0, w.shape[0]) < M)[None, :]
    logits = tl.dot(q, tl.trans(w), input_precision=PRECISION) * (tl.sqrt(scale) * LOG2E)
    logits = tl.where(real, logits, float("-inf"))
    if NEAR:
        if FEATURES == "favor":
            logits -= (tl.sum(q.to(tl.float32) * q, 1) * (scale * 0.5 * LOG2E))[:, None]
        elif FEATURES == "hedgehog":
            logits -= log_sum_exp(logits, 1)[:, None]
        logits += gate
    return logits


@triton.jit
def key_logits(k, w, scale, M, FEATURES: tl.constexpr, PRECISION: tl.constexpr):
    """lk transposed, `[F, C]`; rows beyond M meet queries of weight 0, so they must be finite."""
    logits = tl.dot(w, tl.trans(k), input_precision=PRECISION) * (tl.sqrt(scale) * LOG2E)
    if FEATURES == "favor":
        logits -= (tl.sum(k.to(tl.float32) * k, 1) * (scale * 0.5 * LOG2E))[None, :]
    elif FEATURES == "hedgehog":
        real = (tl.arange(0, w.shape[0]) < M)[:, None]
        logits -= log_sum_exp(tl.where(real, logits, float("-inf")), 0)[None, :]
        logits = tl.where(real, logits, EMPTY)
    return logits


@triton.jit
def static_reference(w, scale, FEATURES: tl.constexpr):
    """A reference `[F]` that no key moves: a bound of lk, for favor log2(e) |w_m|^2 / 2."""
    if FEATURES == "hedgehog":
        bound = tl.zeros([w.shape[0]], tl.float32)
    else:
        bound = tl.ceil(tl.sum(w.to(tl.float32) * w, 1) * (0.5 * LOG2E))
    return bound - HEADROOM


@triton.jit
def advance_reference(r, logits, real, STATIC: tl.constexpr):
    """The reference `[F]` after a block of keys, `logits` `[F, C]`, of which some are `real`."""
    if not STATIC:
        top = tl.max(tl.where(real[None, :], logits, EMPTY), 1)
        r = tl.maximum(r, tl.ceil(top) - HEADROOM)
    return r


@triton.jit
def key_features(logits, r, real):
    """`phi(k) 2^-r` `[F, C]`, 0 where the key is not real; a static r may lie too low."""
    shifted = tl.minimum(tl.maximum(logits - r[:, None], -CLAMP), CEILING)
    return tl.where(real[None, :], tl.exp2(shifted), 0.0)


@triton.jit
def fold_state(state, z, decay, features, values, PRECISION: tl.constexpr):
    """Add keys, features `[F, C]` and values `[C, COLS]`, to a state scaled by decay `[F]`."""
    weights = features.to(values.dtype)
    z = z * decay + tl.sum(weights.to(tl.float32), 1)
    state = tl.dot(weights, values, state * decay[:, None], input_precision=PRECISION)
    return state, z


@triton.jit
def _exponent_rest(log_scale, r):
    """`log2(e) log_scale - r` without rounding the product: both factors are split in two."""
    coarse = tl.floor(log_scale * 16) / 16
    exact = coarse * LOG2E_COARSE - r  # 15 bits times 9
    rest = exact + (coarse * LOG2E_FINE + (log_scale - coarse) * LOG2E)
    return tl.where(log_scale > 0.5 * EMPTY, rest, 0.0)


@triton.jit
def natural_to_base2(log_scale):
    """The integer reference nearest `log2(e) log_scale`, and the factor the sums then need."""
    r = tl.where(log_scale > 0.5 * EMPTY, tl.floor(log_scale * LOG2E + 0.5), EMPTY)
    return r, tl.exp2(_exponent_rest(log_scale, r))


@triton.jit
def base2_to_natural(r):
    """The natural logarithm of a reference, and the factor that makes up for its rounding."""
    log_scale = tl.where(r > 0.5 * EMPTY, r * LN2, EMPTY)
    return log_scale, tl.exp2(-_exponent_rest(log_scale, r))


@triton.jit
def query_shares(logits, r, lse):
    """`2^{lq + r - L}` `[C, F]`: with the features of a key, shares of a probability.

    Rows that see nothing have L = inf. No row needs more than 2^CLAMP; where r has seen keys
    that a row does not, larger ones would meet a state of zeros.
    """
    return tl.exp2(tl.minimum(logits + r[None, :] - lse[:, None], CLAMP + 10))


@triton.jit
def through_norm(dlogits, logits, gate, FEATURES: tl.constexpr, AXIS: tl.constexpr):
    """Gradient of `w.x` from that of `w.x - norm` where the norm is a log-sum-exp over features."""
    if FEATURES == "hedgehog":
        dlogits -= tl.exp2(logits - gate) * tl.expand_dims(tl.sum(dlogits, AXIS), AXIS)
    return dlogits


@triton.jit
def entry_of(t, blocks, lag, CAUSAL: tl.constexpr):
    """How many blocks the state before query block t holds: the place of its reference."""
    entry = tl.minimum(tl.maximum(t - lag, 0), tl.maximum(blocks - lag, 0))
    return entry if CAUSAL else entry * 0


@triton.jit
def window_pairs(t, x, o, lag, split, block):
    """Which pairs of query block t and key block x the exact window holds; `o` is 0 .. C-1."""
    causal = (x * block + o)[None, :] <= (t * block + o)[:, None]
    return causal & ((o < split) | (x + 0 * o != t - lag))[:, None]


@triton.jit
def split_pairs(o, split, NEAR: tl.constexpr):
    """Which pairs of query block t and key block t - lag meet through features: `[query, key]`."""
    if NEAR:
        pairs = (o >= split)[:, None] & (o >= 0)[None, :]
    else:
        pairs = o[None, :] <= o[:, None]
    return pairs


@triton.jit
def load_state(kv_ptr, z_ptr, r_ptr, place, M, DIM: tl.constexpr, COLS: tl.constexpr,
               F: tl.constexpr):
    """A stored state `[F, COLS]`, `[F]` and its reference `[F]`, from row `place` on."""
    m = tl.arange(0, F)
    state = load_rows(kv_ptr + place * DIM, (DIM, 1), tl.program_id(0) * 0, m < M, F, COLS, DIM)
    z = tl.load(z_ptr + place + m, mask=m < M, other=0.0)
    return state, z, tl.load(r_ptr + place + m, mask=m < M, other=0.0)
