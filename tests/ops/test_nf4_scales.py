"""What an NF4Tensor asks of its scales, which kernels read as they lie."""

import dataclasses

import pytest
import torch

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
