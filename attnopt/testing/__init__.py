"""What tests, benchmarks and measuring tools enumerate: every op and phase, with inputs.

`cases()` lists them, `force_triton()` sends ops to their Triton kernels on any device, and
`written_kernels(op)` names the kernels that must be reached.
"""

from attnopt.kernels.dispatch import force_triton
from attnopt.testing.case import Case, cases
from attnopt.testing.kernels import written_kernels

__all__ = ["Case", "cases", "force_triton", "written_kernels"]
