"""What every operator does around its kernels."""

from types import SimpleNamespace

import pytest
import torch
from attention_inputs import needs_triton

from attnopt import favor_attention, lastk_attention, mean_compress, nsa_attention
from attnopt.kernels import dispatch


@needs_triton
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"fp32_precision": "tf32"}, "tf32"),
        ({"fp32_precision": "ieee"}, "tf32x3"),
        ({"fp32_precision": "none"}, "tf32x3"),
        ({"allow_tf32": True}, "tf32"),  # torch before 2.9
        ({"allow_tf32": False}, "tf32x3"),
    ],
)
def test_the_users_choice_of_tf32_is_read_in_both_spellings(settings, expected, monkeypatch):
    from attnopt.kernels.common import input_precision

    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(**settings))
    assert input_precision(torch.float32) == expected
    assert input_precision(torch.bfloat16) == "tf32"


def test_operators_run_on_the_device_of_their_tensors(monkeypatch):
    """Triton launches on the current device, so every operator makes that of `q` current."""
    entered, own = [], torch.cuda.device_of
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: entered.append(x.device) or own(x))
    q, k, v = (torch.randn(1, 2, 9, 8, requires_grad=True) for _ in range(3))
    k_cmp, v_cmp = (mean_compress(x, compress_block=2, compress_stride=2) for x in (k, v))
    sizes = {"select_block": 2, "num_selected": 1, "window": 2}
    calls = [  # operators, forward and backward
        (2, lambda: lastk_attention(q, k, v, torch.zeros(3))),
        (2, lambda: favor_attention(q, k, v, torch.randn(4, 8))),
        (7, lambda: nsa_attention(q, k, v, k_cmp, v_cmp, **sizes)),
    ]
    for count, call in calls:
        entered.clear()
        call().sum().backward(retain_graph=True)
        assert len(entered) == count


def test_autocast_is_off_inside():
    with torch.autocast("cpu", torch.bfloat16), dispatch.operator_body(torch.zeros(1)):
        assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("name", ["eager", "triton", "reference"])
def test_a_forced_backend_is_what_auto_means(name):
    q = torch.zeros(1, 1, 2, 4)
    before = dispatch.resolve_backend("auto", q)
    with dispatch.force_backend("reference"), dispatch.force_backend(name):
        assert dispatch.resolve_backend("auto", q) == name
        assert dispatch.resolve_backend("eager", q) == "eager"
    assert dispatch.resolve_backend("auto", q) == before
    with dispatch.force_triton():
        assert dispatch.resolve_backend("auto", q) == "triton"
        assert dispatch.resolve_backend("auto", q.double()) == "eager"


def test_an_unknown_backend_cannot_be_forced():
    with pytest.raises(ValueError, match="backend must be one of .*; got 'cuda'"):
        with dispatch.force_backend("cuda"):
            pass
