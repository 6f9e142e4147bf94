"""What an NF4Tensor asks of its scales, which kernels read as they lie."""

import dataclasses
import functools

import pytest
import torch

from peft_engine.ops import nf4
from peft_engine.ops.nf4 import NF4Tensor, nf4_quantize


@pytest.mark.parametrize("double", [False, True])
def test_scales_that_kernels_would_misread_are_refused_and_those_of_files_are_mended(backend, double):
    q = nf4_quantize(torch.randn(8, 640), double_quant=double)
    wide, column = torch.bfloat16, torch.ones(80, 2, dtype=q.absmax.dtype)[:, 1]
    changes = {"absmax": [column]}
    if double:
        changes |= {"nested_absmax": [q.nested_absmax.to(wide)], "offset": [q.offset.double()]}
    else:
        changes["absmax"] += [q.absmax.to(wide), q.absmax.double(), q.absmax[:1].expand(80)]
    for name, values in changes.items():
        for value in values:
            with pytest.raises(ValueError, match=f"NF4Tensor: {name} must be torch"):
                dataclasses.replace(q, **{name: value})
    stored = q.to_bnb_state_dict()
    scale = "weight.nested_absmax" if double else "weight.absmax"
    stored[scale] = stored[scale].double()
    assert torch.equal(NF4Tensor.from_bnb_state_dict(stored).dequantize(), q.dequantize())


@pytest.mark.parametrize(
    "defaults", [{"dtype": torch.bfloat16}, {"dtype": torch.float64}, {"device": "meta"}]
)
def test_torch_defaults_of_the_moment_change_nothing(monkeypatch, defaults):
    """As inside from_pretrained, which makes the model's dtype the default."""
    w = torch.randn(64, 640)
    want = nf4_quantize(w, double_quant=True)
    stored = want.to_bnb_state_dict()
    monkeypatch.setattr(nf4, "_absmax_points", functools.cache(nf4._absmax_points.__wrapped__))
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(defaults.get("dtype", before))
        with torch.device(defaults.get("device", "cpu")):
            got = nf4_quantize(w, double_quant=True)
            nothing = nf4_quantize(w[:0], double_quant=True)
            again = NF4Tensor.from_bnb_state_dict(got.to_bnb_state_dict())
            assert torch.equal(nf4._absmax_code(), nf4.ABSMAX_CODE)
    finally:
        torch.set_default_dtype(before)
    assert nothing.offset.dtype == torch.float32 and nothing.offset.device.type == "cpu"
    for q in (got, again):
        assert all(torch.equal(t, stored[name]) for name, t in q.to_bnb_state_dict().items())
