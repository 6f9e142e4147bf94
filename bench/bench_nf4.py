"""NF4 quantise and dequantise: the suite `dequantise`, and pytest-benchmark cases of both.

python -m bench.runner dequantise
python -m pytest bench/bench_nf4.py --benchmark-only
"""

from collections.abc import Iterator

import pytest
import torch

from bench import measure
from peft_engine import dispatch
from peft_engine.ops import nf4_dequantize, nf4_quantize


def moved(q, out: torch.Tensor) -> int:
    """Bytes read and written by a dequantise: packed weight, scales, result."""
    scales = (t for t in (q.absmax, q.nested_absmax) if t is not None)
    return (
        q.packed.numel()
        + sum(t.numel() * t.element_size() for t in scales)
        + out.numel() * out.element_size()
    )


def dequantise(settings: measure.Settings) -> Iterator[measure.Row]:
    """GB/s in bytes moved, 4096x4096 to bf16, against a copy that moves as many and against bitsandbytes."""
    import bitsandbytes.functional as bnb

    for size in (256,) if settings.quick else (1024, 4096):
        weight = torch.randn(size, size, dtype=torch.bfloat16)
        q = nf4_quantize(weight, double_quant=True)
        theirs, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        out = torch.empty_like(weight)
        total = moved(q, out)
        half = torch.randint(0, 256, (total // 2,), dtype=torch.uint8)
        copied = torch.empty_like(half)
        contenders = {
            "peft-engine": lambda q=q, out=out: nf4_dequantize(q, out=out),
            "peft-engine, fresh result": lambda q=q: nf4_dequantize(q, dtype=torch.bfloat16),
            "copy of as many bytes": lambda copied=copied, half=half: copied.copy_(half),
            # 0.50 takes no buffer on a CPU.
            "bitsandbytes, fresh result": lambda theirs=theirs, state=state: bnb.dequantize_4bit(
                theirs, state
            ),
            "reference": lambda q=q, out=out: on_reference(q, out),
        }
        samples = measure.interleave(contenders, settings.rounds)
        for name, seconds in samples.items():
            case = f"{size}x{size}, double quantisation"
            yield measure.row(case, name, "bytes moved", "GB/s", (total / s / 1e9 for s in seconds))
            yield measure.row(case, name, "time", "ms", (s * 1e3 for s in seconds))


def on_reference(q, out: torch.Tensor) -> torch.Tensor:
    with dispatch.force_backend("reference"):
        return nf4_dequantize(q, out=out)


@pytest.mark.parametrize("double_quant", [False, True], ids=["single", "double"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("size", [576, 2048])
def test_dequantize(benchmark, size: int, dtype: torch.dtype, double_quant: bool):
    q = nf4_quantize(torch.randn(size, size, dtype=dtype), double_quant=double_quant)
    out = torch.empty(size, size, dtype=dtype)
    benchmark.extra_info["bytes"] = moved(q, out)
    benchmark(nf4_dequantize, q, out=out)


@pytest.mark.parametrize("size", [576, 2048])
def test_quantize(benchmark, size: int):
    weight = torch.randn(size, size, dtype=torch.bfloat16)
    benchmark(nf4_quantize, weight, double_quant=True)
