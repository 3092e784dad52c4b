"""Random and learned projections: directions, norms, generators, and what is refused."""

import pytest
import torch

from attnopt.kernels.favor import hedgehog_projection, orthogonal_projection


@pytest.mark.parametrize("heads", [None, 3])
@pytest.mark.parametrize("norms", ["chi", "constant"])
def test_rows_are_orthogonal_in_blocks(norms: str, heads: int | None) -> None:
    options = {"heads": heads, "norms": norms, "dtype": torch.float64}
    rng = torch.Generator().manual_seed(0)
    rows = orthogonal_projection(40, 16, generator=rng, **options)
    assert rows.shape == ((40, 16) if heads is None else (3, 40, 16))
    for block in rows.split(16, dim=-2):
        gram = block @ block.mT
        off = gram - torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1))
        assert off.abs().max() <= 1e-12
    if norms == "constant":
        torch.testing.assert_close(rows.norm(dim=-1), torch.full_like(rows[..., 0], 4.0))
    if heads:
        assert not torch.equal(rows[0], rows[1])
    again = orthogonal_projection(40, 16, generator=rng.manual_seed(0), **options)
    assert torch.equal(rows, again)
    single = orthogonal_projection(
        40, 16, generator=rng.manual_seed(0), **options | {"dtype": torch.float32}
    )
    assert torch.equal(single, rows.float())
    assert not torch.equal(orthogonal_projection(40, 16, generator=rng, **options), rows)


def test_chi_norms_are_those_of_gaussian_rows() -> None:
    """Mean and variance of |w|^2 are D and 2 D; directions have no preferred axis or sign."""
    rng = torch.Generator().manual_seed(0)
    rows = orthogonal_projection(8, 8, heads=5000, generator=rng, dtype=torch.float64)
    square = rows.square().sum(-1)
    assert abs(square.mean() - 8) < 0.1  # six standard errors: 6 * 4 / 200 = 0.12
    assert abs(square.var() - 16) < 1
    assert rows.mean((0, 1)).abs().max() < 0.03
    assert (rows.square().mean((0, 1)) - 1).abs().max() < 0.05
    assert (rows.pow(4).mean() - 3).abs() < 0.1  # as for normal numbers


@pytest.mark.parametrize("change, words", [
    ({"num_features": 0}, "num_features.*0"), ({"head_dim": 2.0}, "head_dim.*2.0"),
    ({"heads": 0}, "heads.*0"), ({"norms": "unit"}, "chi, constant.*unit"),
])  # fmt: skip
def test_projection_refuses(change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        orthogonal_projection(**{"num_features": 4, "head_dim": 4} | change)


def test_hedgehog_rows_come_with_their_negatives() -> None:
    rows = hedgehog_projection(12, 4)
    assert torch.equal(rows[:6], -rows[6:])
    assert torch.equal(rows[:4], torch.eye(4))
    assert torch.equal(rows[4:6], 2 * torch.eye(4)[:2])
    assert hedgehog_projection(12, 4, heads=3, dtype=torch.float64).shape == (3, 12, 4)
    for features in (7, 0):
        with pytest.raises(ValueError, match=f"even.*{features}"):
            hedgehog_projection(features, 4)
