"""prefix_attention's Triton kernels with capped scores, by the rule of twice the reference's own error."""

import pytest
import torch
from test_prefix_attention_triton import (
    CAUSAL,
    NOTHING,
    added,
    case,
    check,
    dropped,
    intervals,
    ours,
    plain,
    small_tiles,
    tiles,
)

from peft_engine.ops.nf4 import DTYPES

pytestmark = pytest.mark.usefixtures("nan_filled")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [50.0, 1.5])
def test_capped_scores_are_within_twice_the_reference_error(dtype, softcap):
    with small_tiles():
        check(*case(dtype=dtype), softcap=softcap, what="no mask")
        check(*case(dtype=dtype, size=3.0), CAUSAL, softcap=softcap, what="large")
        check(*case(dtype=dtype, size=0.05, prefix=21), CAUSAL, softcap=softcap, what="small")
        for i, kind in enumerate(("documents", "padding", "window", "nothing")):
            ends = *intervals(kind, 2, 19, 37), None, False
            given = case(heads=4, kv_heads=2, keys=37, dtype=dtype, prefix=5 * (i % 2), copies=1 + i // 2)
            check(*given, ends, softcap=softcap, what=kind)


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_beside_a_bias_and_dropout(dtype):
    with small_tiles():
        both = *intervals("documents", 2, 19, 20), added(2, 2, 19, 20), False
        check(*case(keys=20, dtype=dtype), both, softcap=2.0, what="both")
        check(*case(heads=4, kv_heads=2, dtype=dtype), CAUSAL, dropout=dropped(), softcap=2.0, what="dropout")
        check(*case(keys=20, dtype=dtype), both, dropout=dropped(), softcap=2.0, what="all three")


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_by_the_tiles_of_the_table(head_dim):
    for dtype in (torch.float32, torch.bfloat16):
        given = case(batch=1, queries=40, keys=70, heads=2, kv_heads=1, head_dim=head_dim, dtype=dtype)
        check(*given, CAUSAL, softcap=5.0)


def test_split_keys_and_a_prefix_summed_over_shares(monkeypatch):
    check(*case(queries=130, keys=5, head_dim=16, copies=1), softcap=2.0)
    monkeypatch.setattr(tiles, "CHUNK", 64)
    check(*case(heads=4, kv_heads=2, queries=3, keys=130, prefix=20), CAUSAL, softcap=2.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_far_above_the_cap_are_the_cap(dtype):
    """Two values of P for a row, hardly a gradient of q and k, and no NaN where a product is infinite."""
    given = case(dtype=torch.float32, size=200.0)
    dout, tensors = given[0].to(dtype), [t.to(dtype) for t in given[1]]
    got, lse = ours(dout, tensors, CAUSAL, 1.0, softcap=3.0)
    same = plain(dout.double(), [t.double() for t in tensors], CAUSAL, 1.0, softcap=3.0)
    assert all(t.isfinite().all() for t in (*got, lse))
    torch.testing.assert_close(got[0].double(), same[0], rtol=0.02, atol=2.0)
    uncapped, _ = ours(dout, tensors, CAUSAL, 1.0)
    for mine, free in zip(got[1:3], uncapped[1:3], strict=True):
        assert mine.abs().mean() < 0.05 * free.abs().mean()
    tiny, _ = ours(dout, tensors, NOTHING, 1e30, softcap=1e-6)
    assert all(t.isfinite().all() for t in tiny)
