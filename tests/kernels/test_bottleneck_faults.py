"""Faults planted in the bottleneck's Triton kernels are found, each by the interpreter or by the answer."""

import importlib

import faulty
import pytest
import test_bottleneck_triton as bottleneck_test
import torch
from peft_engine.kernels.bottleneck import tiles
from triton_interpreter import OutOfBounds, Race

from peft_engine.kernels import tiles as shared_tiles

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the mended interpreter is for CPU tensors")

PACKAGE = "peft_engine.kernels.bottleneck"
WRONG = AssertionError

# The smallest calls that show the faults: tails, several tiles of each kind, shares of columns and of rows.
SMALL = {
    "fused": (16, 32, 16, 4, 2), "fused_backward": (16, 32, 16, 4, 2), "contract": (16, 16, 16, 4, 2),
    "up": (16, 16, 16, 4, 2), "dx": (16, 16, 16, 4, 2), "outer": (16, 16, 16, 4, 2),
}  # fmt: skip
HALF, WHOLE = torch.bfloat16, torch.float32
CASES = {
    "gelu": {"shape": (5, 41, 20, HALF, "gelu"), "norm": True},
    "silu": {"shape": (17, 24, 9, HALF, "silu"), "weight": WHOLE},
    "tanh": {"shape": (5, 24, 9, WHOLE, "tanh")},
    "relu": {"shape": (5, 40, 9, WHOLE, "relu"), "norm": True},
    "columns": {"shape": (3, 70, 20, HALF, "relu")},
    "norm": {"shape": (3, 300, 9, HALF, "relu"), "norm": True},
    "rows": {"shape": (260, 17, 3, HALF, "relu")},
}

# file, the call, what is replaced, by what, how it is found
FAULTS = [
    # an activation, a slope
    ("parts", "gelu", "tl.erf(m * 0.7071067811865476)) + m", "tl.erf(m * 0.7071067811865476)) - m", WRONG),
    ("parts", "silu", "a = m / (1.0 + tl.exp(-m))", "a = m / (1.0 + tl.exp(m))", WRONG),
    ("parts", "tanh", "tl.where(m < 0.0, -large, large)", "large", WRONG),
    ("parts", "relu", "d = tl.where(m <= 0.0, 0.0, 1.0)", "d = tl.where(m < 1.0, 0.0, 1.0)", WRONG),
    # a term of a float32 weight dropped
    ("parts", "silu", "tl.dot(a, second, tl.dot(a, third))", "tl.dot(a, third)", WRONG),
    # the norm: blocks' means not merged, its bias or weight left out
    ("parts", "relu", "squares += tl.sum(off * off, 1) +", "squares += tl.sum(off * off, 1) + 0 *", WRONG),
    ("parts", "gelu", "z += tl.load(norm_bias", "z += 0 * tl.load(norm_bias", WRONG),
    ("parts", "gelu", "return dz * weight[None, :],", "return dz,", WRONG),
    # masks, biases, the residual, scaling
    ("parts", "gelu", "both = inside[:, None] & there", "both = (row >= 0)[:, None] & there", OutOfBounds),
    ("parts", "silu", "there = k < columns", "there = k < columns + 1", OutOfBounds),
    ("parts", "tanh", "acc += tl.load(down_bias", "acc -= tl.load(down_bias", WRONG),
    ("parts", "tanh", "(base + scaling * raised)", "(base + raised)", WRONG),
    ("parts", "tanh", "return acc * scaling * slope", "return acc * slope", WRONG),
    ("parts", "tanh", "(r < width)[:, None] & there", "(r >= 0)[:, None] & there", OutOfBounds),
    ("fused", "gelu", "sum_gx += tl.sum(g * normal, 1)", "sum_gx += tl.sum(g, 1)", WRONG),
    ("fused", "tanh", "dz += tl.load(dy", "dz += 0 * tl.load(dy", WRONG),
    ("fused", "gelu", "x, row, inside, columns, eps,", "x, row, inside, columns, eps + 1,", WRONG),
    ("split", "columns", "for s in range(shares)", "for s in range(1)", WRONG),
    ("split", "columns", "(tl.cast(split, tl.int64) * rows + row)", "row", Race),
    ("split", "gelu", "to + 2 * tl.program_id(0), tl.sum", "to, tl.sum", Race),
    ("split", "gelu", "(block < blocks)[None, :]", "(block < 1)[None, :]", WRONG),
    ("split", "norm", "range(0, blocks, BLOCK)", "range(0, BLOCK, BLOCK)", WRONG),
    ("split", "gelu", "tl.sum(sum_gx, 1) / columns", "tl.sum(sum_gx, 1)", WRONG),
    ("split", "gelu", "range(0, WIDTH, BLOCK_R)", "range(0, BLOCK_R, BLOCK_R)", WRONG),
    ("outer", "tanh", "last = tl.minimum(rows, first + share)", "last = first + share", OutOfBounds),
    ("outer", "rows", "(place * width + r)[:, None] * columns", "r[:, None] * columns", Race),
    ("outer", "rows", "for s in range(splits)", "for s in range(1)", WRONG),
    ("outer", "tanh", "tl.trans(sum * scaling)", "tl.trans(sum)", WRONG),
    ("outer", "gelu", "if tl.program_id(2) == 0:", "if tl.program_id(2) >= 0:", Race),
    ("outer", "gelu", "sum += bias[:, None] * shift[None, :]", "sum += shift[None, :]", WRONG),
    ("outer", "gelu", "tl.sum(weight * sum, 0)", "tl.sum(sum, 0)", WRONG),
]

USERS = {
    "fused": ("forward", "backward"),
    "split": ("forward", "backward"),
    "outer": ("backward",),
    "parts": ("fused", "split", "outer"),
}


def install(monkeypatch, tmp_path, file, old, new):
    copy = faulty.plant(importlib.import_module(f"{PACKAGE}.{file}"), tmp_path, old, new)
    for user in USERS[file]:
        module = importlib.import_module(f"{PACKAGE}.{user}")
        for name in vars(copy) if file == "parts" else (file,):
            if name in vars(module) and not name.startswith("_") and name not in ("tl", "triton"):
                monkeypatch.setattr(module, name, getattr(copy, name, copy))


def run(path: str, name: str) -> None:
    changes = dict(CASES[name])
    with tiles.pinned(path):
        bottleneck_test.case("cpu", *changes.pop("shape"), **changes)


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch, request):
    rows = "rows" in request.node.callspec.params.values()
    monkeypatch.setattr(shared_tiles, "_set", {} if rows else dict(SMALL))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("path", tiles.PATHS)
def test_without_a_fault_nothing_is_found(path, name):
    run(path, name)


@pytest.mark.parametrize("file,name,old,new,found", FAULTS)
def test_a_fault_in_bottleneck_is_found(tmp_path, monkeypatch, file, name, old, new, found):
    install(monkeypatch, tmp_path, file, old, new)
    with pytest.raises(found):
        run("split" if file == "split" else "fused", name)
