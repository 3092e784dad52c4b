"""Which blocks overlap, exist and are near: the geometry against counting token by token."""

import pytest
import torch

from attnopt.kernels.nsa import geometry, mean_compress
from attnopt.kernels.nsa.compress import cut_blocks

SIZES = [(32, 16, 64), (16, 16, 16), (5, 3, 8), (8, 12, 6), (1, 1, 1), (7, 2, 3), (3, 5, 4)]


@pytest.mark.parametrize("sizes", SIZES)
def test_overlap_counts_shared_tokens(sizes):
    block, stride, select = sizes
    j, c = torch.arange(12), torch.arange(-40, 120)
    token = torch.arange(-1000, 3000)
    in_c = (token >= c[:, None] * stride) & (token < c[:, None] * stride + block)
    in_j = (token >= j[:, None] * select) & (token < (j[:, None] + 1) * select)
    shared = (in_c[:, None] & in_j).sum(-1)  # [c, j]
    found = geometry.overlap(c[:, None], j, block, stride, select)
    assert torch.equal(found, shared * (c >= 0)[:, None])
    assert geometry.overlap_count(block, stride, select) == (shared > 0).sum(0).max()
    first = geometry.first_overlap(j, block, stride, select)
    lowest = torch.where(shared > 0, c[:, None], 1000).amin(0)
    assert torch.equal(first[lowest < 1000], lowest[lowest < 1000])


def test_paper_weights():
    """l=32, d=16, b=64: 1, 2, 2, 2, 1 over c = 4j - 1 .. 4j + 3."""
    c, j = torch.arange(3, 8), torch.tensor(1)
    assert geometry.first_overlap(j, 32, 16, 64) == 3
    assert geometry.overlap_count(32, 16, 64) == 5
    assert (geometry.overlap(c, j, 32, 16, 64) / 16).tolist() == [1, 2, 2, 2, 1]


@pytest.mark.parametrize("local", [0, 1, 2, 3])
def test_local_blocks_are_a_near_window(local):
    position = torch.arange(100)
    first = geometry.near_block(position, 8, geometry.near_window_of(local, 8))
    assert torch.equal(first, (position // 8 - local + 1).clamp_min(0))


def test_blocks_count_from_the_first_real_token():
    x = torch.arange(2 * 11, dtype=torch.float64).view(2, 1, 11, 1)
    mask = torch.ones(2, 11, dtype=torch.bool)
    mask[0, :4] = False
    mask[1, 5] = False
    blocks, real = cut_blocks(x, block=3, stride=2, key_mask=mask)
    assert blocks.shape == (2, 1, geometry.compressed_count(11, 3, 2), 3, 1)
    assert blocks[0, 0, :3, :, 0].tolist() == [[4, 5, 6], [6, 7, 8], [8, 9, 10]]
    assert real[0, :3].all() and not real[0, 4].any()
    mean = mean_compress(x, compress_block=3, compress_stride=2, key_mask=mask)
    alone = mean_compress(x[:1, :, 4:], compress_block=3, compress_stride=2)
    assert torch.equal(mean[:1, :, :3], alone)
    assert mean[1, 0, 2, 0] == (15 + 17) / 2  # token 5 of the row, 16, is masked
    start = geometry.row_starts(mask, x)
    assert geometry.real_tokens(mask, start, 3, 2, 5)[:, :5].tolist() == [
        [3, 3, 3, 1, 0], [3, 3, 2, 3, 3],
    ]  # fmt: skip


def test_short_texts_have_no_block():
    x = torch.zeros(1, 1, 2, 4)
    assert mean_compress(x, compress_block=3, compress_stride=1).shape == (1, 1, 0, 4)
    mask = torch.ones(1, 2, dtype=torch.bool)
    assert mean_compress(x, compress_block=3, compress_stride=1, key_mask=mask).shape[2] == 0


@pytest.mark.parametrize("size", [0, -1, 2.0, True])
def test_bad_sizes_are_named(size):
    with pytest.raises(ValueError, match="compress_stride must be an integer of at least 1; got"):
        mean_compress(torch.zeros(1, 1, 4, 4), compress_block=2, compress_stride=size)
