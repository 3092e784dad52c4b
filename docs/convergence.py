"""How fast do FAVOR+ estimates of softmax attention converge as the number of features grows?

    python docs/convergence.py        # writes docs/results/favor/convergence.{json,png}

The root mean square error of the attention weights of causal FAVOR+ against softmax, over heads
with projections of their own: unbiased rows (chi norms) and regularized ones (constant norms), and
entries of q and k of two sizes. Unbiased estimates fall like M^-1/2 once their tail is sampled;
regularized ones stop at their bias, which at larger norms is by far the smaller error.
"""

import json
import math
from pathlib import Path

import torch
from matplotlib import pyplot as plt

from attnopt import favor_attention, orthogonal_projection

FOLDER = Path(__file__).resolve().parent / "results" / "favor"
FEATURES = (16, 32, 64, 128, 256, 512, 1024)
HEADS, N, D = 64, 16, 16
STDS = (0.25, 1.0)


def error(count: int, norms: str, std: float) -> float:
    """Root mean square error of the weights, with values that pick one key each."""
    generator = torch.Generator().manual_seed(count)
    q, k = (torch.randn(1, HEADS, N, D, generator=generator) * std for _ in range(2))
    v = torch.eye(N, D).expand(1, HEADS, N, D)  # N = D: the output is the row of weights
    rows = orthogonal_projection(count, D, heads=HEADS, norms=norms, generator=generator)
    found = favor_attention(q, k, v, rows, backend="eager")
    scores = q @ k.mT * D**-0.5
    exact = scores.masked_fill(~torch.ones(N, N).tril().bool(), -math.inf).softmax(-1)
    return (found - exact).square().mean().sqrt().item()


def main() -> None:
    """Measure, write the numbers and draw them."""
    curves = {
        f"{norms} norms, std {std}": [error(m, norms, std) for m in FEATURES]
        for std in STDS
        for norms in ("chi", "constant")
    }
    FOLDER.mkdir(parents=True, exist_ok=True)
    record = {"features": FEATURES, "heads": HEADS, "tokens": N, "head_dim": D, "error": curves}
    (FOLDER / "convergence.json").write_text(json.dumps(record, indent=1) + "\n")
    figure, axes = plt.subplots(figsize=(5.2, 3.4), layout="constrained")
    for label, values in curves.items():
        axes.loglog(FEATURES, values, marker="o", markersize=3, label=label)
    guide = [curves["chi norms, std 0.25"][0] * (FEATURES[0] / m) ** 0.5 for m in FEATURES]
    axes.loglog(FEATURES, guide, color="gray", linestyle=":", label="slope -1/2")
    axes.set(xlabel="features M", ylabel="error of the attention weights (rms)")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(FOLDER / "convergence.png", dpi=150)


if __name__ == "__main__":
    main()
