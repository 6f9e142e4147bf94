"""The rule by which a kernel passes: an error at most twice that of plain torch in the same dtype."""

import torch


def assert_twice_as_good(got, plain, exact, terms=None, what=""):
    """The largest error and the norm of `got` are at most twice `plain`'s; float64 `exact` is the truth.

    Of a few numbers plain torch gets some exact by luck. Hence, besides: one unit in the last place of the
    largest result, and one in float32 of `terms`, the magnitudes added up to it, where they are given.
    """
    assert got.shape == exact.shape and got.dtype == plain.dtype, what
    if exact.numel() == 0:
        return
    error, allowed = got.double() - exact, plain.double() - exact
    rounding = torch.finfo(got.dtype).eps * exact.abs().max()
    sums = torch.finfo(torch.float32).eps * (torch.zeros(1) if terms is None else terms)
    assert error.abs().max() <= 2 * allowed.abs().max() + rounding + sums.max(), what
    assert error.norm() <= 2 * allowed.norm() + rounding + sums.norm(), what


def assert_together_twice_as_good(triples):
    """Of (got, plain, exact) in threes: errors in parts of each exact norm, together over all of them.

    Of a few numbers plain torch gets some exact by luck, and through a model the rounding of one activation
    decides the errors of many gradients. A wrong one is off by far more than rounding.
    """
    errors = []
    for got, plain, exact in triples:
        assert got.shape == exact.shape and got.dtype == plain.dtype
        if exact.numel() and exact.norm() > 0:
            errors.append([(t.double() - exact).norm() / exact.norm() for t in (got, plain)])
    if errors:
        error, allowed = torch.tensor(errors).square().mean(0).sqrt()
        assert error <= 2 * allowed + torch.finfo(torch.float32).eps
