"""Products with a dense weight without an adapter, as peft_engine/dense.py has them and as torch has.

    python -m bench.runner dense_product

y = x W^T and dx = dy W at the layers of SmolLM2. Half precision is as on a processor without AVX-512 under
PEFT_ENGINE_CPU_ISA=avx2 ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2.
"""

from collections.abc import Iterator
from functools import partial
from itertools import product

import torch
from torch.nn import functional as F

from bench import measure
from peft_engine import dense


def dense_product(settings: measure.Settings) -> Iterator[measure.Row]:
    """Each dtype, 8 rows, as a small batch decodes, and 512."""
    shapes = ((64, 64),) if settings.quick else ((1536, 576), (576, 1536))
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    for dtype, rows, (n, k) in product(dtypes, (8,) if settings.quick else (8, 512), shapes):
        x, w, dy = (torch.randn(shape).to(dtype) for shape in ((rows, k), (n, k), (rows, n)))
        calls = {
            "y": {"peft-engine": partial(dense.product, x, w), "torch": partial(F.linear, x, w)},
            "dx": {"peft-engine": partial(dense.product_back, dy, w), "torch": partial(torch.matmul, dy, w)},
        }
        for what, contenders in calls.items():
            case = f"{str(dtype).removeprefix('torch.')}, {what}, {rows} rows, {n}x{k}"
            for contender, seconds in measure.interleave(contenders, settings.rounds).items():
                note = f"by {dense.library(w)}" if contender == "peft-engine" else ""
                yield measure.row(case, contender, "time", "ms", (s * 1e3 for s in seconds), note)
