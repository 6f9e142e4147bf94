"""Triton kernels run on the GPU where there is one, else in the mended interpreter."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed (the `gpu` extra)")


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def nan_filled():
    """Whatever is allocated without values holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _interpreter():
    if torch.cuda.is_available():
        yield
        return
    from triton_interpreter import mended

    with mended(shuffle=0):
        yield
