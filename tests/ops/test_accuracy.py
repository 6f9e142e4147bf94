"""The rule that kernels are held to refuses what is slightly wrong."""

import pytest
import torch
from accuracy import assert_twice_as_good


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_a_result_scaled_by_099_or_with_a_term_left_out_is_refused(dtype):
    torch.manual_seed(0)
    x, w = torch.randn(9, 192).to(dtype), torch.randn(64, 192).to(dtype)
    exact, plain, terms = x.double() @ w.double().T, x @ w.T, x.double().abs() @ w.double().abs().T
    good = exact.to(dtype)
    assert_twice_as_good(good, plain, exact, terms)
    shifted = exact.clone()
    shifted[3, 5] -= x[3, 7].double() * w[5, 7].double()
    for wrong in (exact * 0.99, exact + 0.01 * exact.std(), shifted):
        with pytest.raises(AssertionError):
            assert_twice_as_good(wrong.to(dtype), plain, exact, terms)
    with pytest.raises(AssertionError):
        assert_twice_as_good(good.double(), plain, exact, terms)
