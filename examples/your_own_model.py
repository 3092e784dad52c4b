"""An attention op in a model and a training loop of your own.

    python your_own_model.py

A one-layer language model learns to repeat what it read 20 tokens ago. Its attention is
`attnopt.lastk_attention` over the last 32 tokens, with one learnable weight for each distance:
after training the largest weight is the distance that matters. Seconds on a CPU; on a GPU the same
code runs fused Triton kernels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attnopt

VOCABULARY, LENGTH, PERIOD, WINDOW = 64, 128, 20, 32


class Attention(nn.Module):
    """Attention over the last WINDOW tokens; log_weights [heads, WINDOW] are learned."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.alpha = nn.Parameter(torch.zeros(heads, WINDOW))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = attnopt.lastk_attention(q, k, v, F.logsigmoid(self.alpha))  # [batch, heads, N, D]
        return self.out(y.transpose(1, 2).flatten(2))


class Model(nn.Module):
    """Embedding, attention, head: just enough to look back."""

    def __init__(self, width: int = 64, heads: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.attention = Attention(width, heads)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return self.head(x + self.attention(x))


def batch(rows: int, device: str) -> Tensor:
    """Random text that repeats itself every PERIOD tokens, [rows, LENGTH]."""
    start = torch.randint(VOCABULARY, (rows, PERIOD), device=device)
    return start.repeat(1, LENGTH // PERIOD + 1)[:, :LENGTH]


def main() -> None:
    """Check the op, train, and look at what was learned."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    # Every op has a definition to check against: backend="reference", here in float64.
    q, k, v = torch.randn(3, 1, 2, 100, 16, device=device)
    weights = torch.randn(WINDOW, device=device)
    right = attnopt.lastk_attention(
        q.double(), k.double(), v.double(), weights.double(), backend="reference"
    )
    error = (attnopt.lastk_attention(q, k, v, weights) - right).abs().max().item()
    assert error < 1e-4, error
    print("the op agrees with its definition")

    model = Model().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(301):
        tokens = batch(8, device)
        logits = model(tokens)[:, PERIOD - 1 : -1]  # from where the text can be predicted
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, PERIOD:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            print(f"step {step}: loss {loss.item():.1f}")

    # Predicting the next token means to look PERIOD - 1 back.
    print("distances of the largest weights:", model.attention.alpha.argmax(1).tolist())


if __name__ == "__main__":
    main()
