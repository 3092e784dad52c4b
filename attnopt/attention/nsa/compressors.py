"""How the tokens of a block become one key or one value. All of these start as the mean.

    mean        phi(x) = mean of x_t over the real tokens t of the block
    weighted    phi(x) = sum_t w_t (x_t + e_t),  w = softmax of learned logits over the real tokens
    mlp         phi(x) = mean of x_t + W_2 gelu(W_1 [x_1 + e_1, ..., x_l + e_l] + b_1) + b_2

with learned embeddings e_t of the positions in a block, per key/value head as the logits are. At
the start the logits, the embeddings, W_2 and b_2 are 0. A block without a real token gives
something finite.

Letters: B batch, Hkv key/value heads, N tokens, D head dimension, l compressed block, P blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnopt.kernels.nsa.compress import average, compress_documents, cut_blocks


class Compressor(nn.Module):
    """Compresses keys or values by the mean of each block; subclasses learn to do better.

    Args:
        num_kv_heads: Hkv.
        head_dim: D.
        block: l.
        stride: tokens from one block to the next.
    """

    def __init__(self, num_kv_heads: int, head_dim: int, *, block: int, stride: int) -> None:
        super().__init__()
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.block = block
        self.stride = stride

    def forward(
        self, x: Tensor, key_mask: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """Compress all blocks of a text.

        Args:
            x: keys or values `[B, Hkv, N, D]`.
            key_mask: bool `[B, N]`, True for real tokens; blocks count from each row's first.
            cu_seqlens: where packed documents begin and end, as in `mean_compress`.

        Returns:
            `[B, Hkv, P, D]` in the dtype of `x`.

        Raises:
            ValueError: what does not fit packed documents.
        """
        if cu_seqlens is not None:
            sizes = {"block": self.block, "stride": self.stride}
            return compress_documents(self, x, cu_seqlens, key_mask=key_mask, **sizes)
        blocks, real = cut_blocks(x, block=self.block, stride=self.stride, key_mask=key_mask)
        return self.pool(blocks, real)

    def pool(self, blocks: Tensor, real: Tensor | None = None) -> Tensor:
        """Compress blocks.

        Args:
            blocks: their tokens `[B, Hkv, P, l, D]`.
            real: bool `[B, P, l]`, True for real tokens; None where all are.

        Returns:
            `[B, Hkv, P, D]` in the dtype of `blocks`.
        """
        with torch.autocast(blocks.device.type, enabled=False):
            return self._pool(blocks, real).to(blocks.dtype)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Go back to the mean, in place; random numbers are drawn on the CPU."""

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"block={self.block}, stride={self.stride}"

    def _pool(self, blocks: Tensor, real: Tensor | None) -> Tensor:
        return average(blocks, real)


class WeightedCompressor(Compressor):
    """A weighted mean with one learned weight, and one learned addend, per position in a block.

    `position_logits` `[Hkv, l]` and `position_embedding` `[Hkv, l, D]` are the parameters.
    """

    def __init__(self, num_kv_heads: int, head_dim: int, *, block: int, stride: int) -> None:
        super().__init__(num_kv_heads, head_dim, block=block, stride=stride)
        self.position_logits = _parameter(num_kv_heads, block)
        self.position_embedding = _parameter(num_kv_heads, block, head_dim)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Set all weights alike and all addends to 0, in place."""
        self.position_logits.zero_()
        self.position_embedding.zero_()

    def _pool(self, blocks: Tensor, real: Tensor | None) -> Tensor:
        wide = torch.promote_types(blocks.dtype, self.position_logits.dtype)
        logits, embedding = self.position_logits.to(wide), self.position_embedding.to(wide)
        if real is None:
            weights = logits.softmax(-1)  # [Hkv, l]
            added = torch.einsum("hl,hld->hd", weights, embedding)
            pooled = torch.einsum("bhpld,hl->bhpd", blocks.to(wide), weights)
            return pooled + added[:, None]
        # not -inf: a block without a real token then is a mean of what it holds, and not NaN
        lowest = torch.finfo(wide).min
        weights = logits[:, None].expand(-1, real.shape[1], -1)
        weights = weights.masked_fill(~real[:, None], lowest).softmax(-1)  # [B, Hkv, P, l]
        added = torch.einsum("bhpl,hld->bhpd", weights, embedding)
        return torch.einsum("bhpld,bhpl->bhpd", blocks.to(wide), weights) + added


class MLPCompressor(Compressor):
    """The mean and what a small network, shared by the heads, makes of the whole block.

    `position_embedding` `[Hkv, l, D]`, `first` (l D to 2 D) and `second` (2 D to D) are learned.
    """

    def __init__(self, num_kv_heads: int, head_dim: int, *, block: int, stride: int) -> None:
        super().__init__(num_kv_heads, head_dim, block=block, stride=stride)
        self.position_embedding = _parameter(num_kv_heads, block, head_dim)
        self.first = Linear(block * head_dim, 2 * head_dim)
        self.second = Linear(2 * head_dim, head_dim)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the first layer as `nn.Linear` does, on the CPU, and set the rest to 0, in place."""
        for parameter in self.parameters():
            parameter.zero_()
        if self.first.weight.is_meta:
            return
        bound = 1 / math.sqrt(self.first.in_features)
        for random in (self.first.weight, self.first.bias):
            drawn = torch.empty(random.shape, dtype=torch.float32, device="cpu")
            random.copy_(drawn.uniform_(-bound, bound, generator=generator))

    def _pool(self, blocks: Tensor, real: Tensor | None) -> Tensor:
        wide = torch.promote_types(blocks.dtype, self.first.weight.dtype)
        tokens = blocks.to(wide) + self.position_embedding.to(wide)[:, None]
        if real is not None:
            tokens = tokens * real[:, None, :, :, None]
        hidden = F.gelu(self.first(tokens.flatten(3)))
        return super()._pool(blocks, real) + self.second(hidden)


class Linear(nn.Linear):
    """A linear layer whose owner initializes it: making one draws no random numbers."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, dtype=torch.float32)

    def reset_parameters(self) -> None:
        """Leave it to the owner."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer; in float64 to what is float64."""
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


COMPRESSORS: dict[str, Callable[..., Compressor]] = {
    "mean": Compressor,
    "weighted": WeightedCompressor,
    "mlp": MLPCompressor,
}


def _parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape, dtype=torch.float32))
