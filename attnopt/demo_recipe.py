"""The demonstration's settings, as options of `attnopt pretrain` and `attnopt distill`.

Found by trying (docstrings of Python 3.11, seed 42, one core): the teacher reads 1.6 million bytes,
ends at a perplexity of 5.1 per byte and has a self-only KL of 1.64 nats; 1000 steps give 6.4 and
1.45, 2000 give 4.7 and 1.81. What the students reach is in docs/results/demo.
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


def _match_and_distill(steps: int) -> list[str]:
    # Attention first, layer by layer; from there the KL needs only a small learning rate.
    return [
        *_COMMON,
        *("--match-steps", str(steps // 2), "--match-learning-rate", "2e-3"),
        *("--steps", str(steps // 2), "--learning-rate", "2e-4"),
    ]


_WINDOW = ["--window", "33", "--window-block", "32"]
_BLOCKS = [
    *("--attention", "nsa", "--select-block", "16", "--window", "32"),
    *("--compression", "weighted", "--learning-rate", "2e-4"),
]
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
    # few steps: its 561 features per head take four times as long
    "based": [*_match_and_distill(40), "--attention", "based", *_WINDOW],
    "performer": [
        *_match_and_distill(300),
        *("--attention", "performer", "--features", "64", "--norms", "constant", *_WINDOW),
    ],
    "hedgehog": [*_match_and_distill(300), "--attention", "hedgehog", *_WINDOW],
    "kerformer": [
        *_match_and_distill(300),
        *("--attention", "kerformer", "--features", "64", "--norms", "constant", *_WINDOW),
    ],
    "nsa": [*_DISTILL, *_BLOCKS, "--num-selected", "2"],
    "nsa-gates": [*_DISTILL, *_BLOCKS, "--combine", "gates", "--num-selected", "4"],
}
EVALUATE = ["--max-tokens", "65536"]
# Students that are timed and quoted: one of each kind of cache.
GENERATE = ("last-5", "last-32-sinks", "performer", "nsa")
