"""The demonstration's settings, as options of `attnopt pretrain` and `attnopt distill`.

Found by trying (docstrings of Python 3.11, seed 42, one core): the teacher reads 1.6 million bytes,
ends at a perplexity of 5.1 per byte and has a self-only KL of 1.64 nats; 1000 steps give 6.4 and
1.45, 2000 give 4.7 and 1.81. The first student reaches a perplexity ratio of 1.035, the second of
1.004.
"""

from pathlib import Path


def _fast_bfloat16() -> list[str]:
    # Without these instructions bfloat16 is emulated, and slower than fp32.
    cpu = Path("/proc/cpuinfo")
    flags = cpu.read_text(errors="replace") if cpu.exists() else ""
    return ["--bf16"] if "amx_bf16" in flags or "avx512_bf16" in flags else []


TEACHER = [
    *("--data", "demo", "--tokenizer", "bytes"),
    *("--layers", "4", "--width", "128", "--heads", "4", "--context", "256"),
    *("--steps", "1600", "--batch-size", "4", "--learning-rate", "2e-3"),
    *_fast_bfloat16(),
]
_COMMON = ["--data", "demo", "--batch-size", "4", *_fast_bfloat16()]
_DISTILL = [*_COMMON, "--steps", "300"]
# Attention first, layer by layer; from there the KL needs only a small learning rate.
_MATCH_AND_DISTILL = [
    *_COMMON,
    *("--match-steps", "150", "--match-learning-rate", "2e-3"),
    *("--steps", "150", "--learning-rate", "2e-4"),
]
_WINDOW = ["--window", "33", "--window-block", "32"]
# Coefficients learn faster than weights, or 300 steps would not move them visibly.
STUDENTS = {
    "last-5": [
        *_DISTILL,
        *("--window", "5", "--learning-rate", "2e-3", "--coefficient-learning-rate", "5e-2"),
    ],
    "last-32-sinks": [
        *_DISTILL,
        *("--window", "32", "--sinks", "4"),
        *("--learning-rate", "3e-4", "--coefficient-learning-rate", "3e-2"),
    ],
    "performer": [
        *_MATCH_AND_DISTILL,
        *("--attention", "performer", "--features", "64", "--norms", "constant", *_WINDOW),
    ],
    "hedgehog": [*_MATCH_AND_DISTILL, "--attention", "hedgehog", *_WINDOW],
    "kerformer": [
        *_MATCH_AND_DISTILL,
        *("--attention", "kerformer", "--features", "64", "--norms", "constant", *_WINDOW),
    ],
    "based": [*_MATCH_AND_DISTILL, "--attention", "based", *_WINDOW],
}
