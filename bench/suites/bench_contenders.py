"""Every contender under pytest-benchmark: attention ops, layers, GPT-2's block and model.

Each is checked against its float64 definition at the timed size first; a wrong one fails and has no
time. On a CPU times are CPU seconds of one thread in fp32, on a GPU seconds up to the end of the
kernels in bf16. `attnopt bench` has growth, memory and ratios; this compares two versions of the
code:

    pytest bench --benchmark-autosave          before
    pytest bench --benchmark-compare           after
"""

import time

import pytest
import torch

from attnopt.bench.contenders import LEVELS, PHASES, Shape, contenders

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
TIMER = time.perf_counter if ON_GPU else time.process_time
LENGTHS = (1024, 8192) if ON_GPU else (256, 1024)
TOO_SLOW = {("layer-nsa-peer", 1024)}  # twelve seconds a call
SHORT_LEVEL = "model"  # twelve layers: minutes, and rounding may change which blocks NSA selects
CELLS = [
    pytest.param(contender, phase, n, id=f"{contender.name}-{phase}-{n}")
    for contender in contenders(LEVELS, DEVICE)
    for phase in PHASES
    for n in LENGTHS
    if phase in contender.phases and (ON_GPU or (contender.name, n) not in TOO_SLOW)
    if contender.level != SHORT_LEVEL or n == LENGTHS[0]
]


@pytest.mark.benchmark(timer=TIMER, warmup=False, min_rounds=3, max_time=0.2)
@pytest.mark.parametrize(("contender", "phase", "n"), CELLS)
def test_contender(benchmark, contender, phase, n):
    why = contender.missing(DEVICE, DTYPE)
    if why is not None:
        pytest.skip(why)
    torch.set_num_threads(1)
    prepared = contender.prepare(phase, Shape(1, 12, 64, n), DTYPE, DEVICE)
    errors = prepared.check()
    assert all(error <= prepared.limit for error in errors.values()), (errors, prepared.limit)

    def call():
        prepared.call()
        if ON_GPU:
            torch.cuda.synchronize()

    benchmark.group = f"{contender.level} {phase} N={n}"
    benchmark.name = contender.name
    benchmark.extra_info = contender.about() | {"errors": errors, "dtype": str(DTYPE)}
    call()
    if phase == "decode" and contender.level != "op":  # every call lengthens the cache
        benchmark.pedantic(call, rounds=10)
    else:
        benchmark(call)
