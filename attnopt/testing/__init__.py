"""What tests, benchmarks and measuring tools enumerate: every op and phase, with inputs.

`cases()` lists them and `force_triton()` sends ops to their Triton kernels on any device.
"""

from attnopt.kernels.dispatch import force_triton
from attnopt.testing.case import Case, cases

__all__ = ["Case", "cases", "force_triton"]
