"""Faults planted in the bottleneck's Triton kernels are found, each by the interpreter or by the answer."""

import importlib

import faulty
import pytest
import test_bottleneck_triton as bottleneck_test
import torch
from peft_engine.kernels.bottleneck import tiles
from triton_interpreter import OutOfBounds, Race

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the mended interpreter is for CPU tensors")

PACKAGE = "peft_engine.kernels.bottleneck"
WRONG = AssertionError

# file, what is replaced, by what, how it is found
FAULTS = [
    # an activation, a slope
    ("parts", "1.0 + tl.erf(m * 0.7071067811865476)) + m", "1.0 + tl.erf(m * 0.7071067811865476)) - m", WRONG),
    ("parts", "a = m / (1.0 + tl.exp(-m))", "a = m / (1.0 + tl.exp(m))", WRONG),
    ("parts", "tl.where(m < 0.0, -large, large)", "large", WRONG),
    ("parts", "d = tl.where(m <= 0.0, 0.0, 1.0)", "d = tl.where(m < 1.0, 0.0, 1.0)", WRONG),
    # a term of a float32 weight dropped
    ("parts", "small = tl.dot(a, second, tl.dot(a, third))", "small = tl.dot(a, third)", WRONG),
    # the norm: means not merged, its bias or weight left out
    ("parts", "squares += tl.sum(off * off, 1) + apart", "squares += tl.sum(off * off, 1) + 0 * apart", WRONG),
    ("parts", "z += tl.load(norm_bias", "z += 0 * tl.load(norm_bias", WRONG),
    ("parts", "return dz * weight[None, :],", "return dz,", WRONG),
    # masks, biases, the residual, scaling
    ("parts", "both = inside[:, None] & there[None, :]", "both = (row >= 0)[:, None] & there[None, :]", OutOfBounds),
    ("parts", "there = k < columns", "there = k < columns + 1", OutOfBounds),
    ("parts", "acc += tl.load(down_bias", "acc -= tl.load(down_bias", WRONG),
    ("parts", "(base + scaling * raised)", "(base + raised)", WRONG),
    ("parts", "return acc * scaling * slope", "return acc * slope", WRONG),
    ("parts", "(r < width)[:, None] & there[None, :]", "(r >= 0)[:, None] & there[None, :]", (OutOfBounds, WRONG)),
    ("fused", "sum_gx += tl.sum(g * normal, 1)", "sum_gx += tl.sum(g, 1)", WRONG),
    ("fused", "dz += tl.load(dy", "dz += 0 * tl.load(dy", WRONG),
    ("fused", "x, row, inside, columns, eps,", "x, row, inside, columns, 100 * eps + 1,", WRONG),
    ("split", "for s in range(shares)", "for s in range(1)", WRONG),
    ("split", "(split.to(tl.int64) * rows + row)", "row", Race),
    ("split", "to + 2 * tl.program_id(0), tl.sum", "to, tl.sum", Race),
    ("split", "for block in range(blocks)", "for block in range(1)", WRONG),
    ("split", "for start in range(0, WIDTH, BLOCK_R)", "for start in range(0, BLOCK_R, BLOCK_R)", WRONG),
    ("outer", "last = tl.minimum(rows, first + share)", "last = first + share", OutOfBounds),
    ("outer", "(place * width + r)[:, None] * columns", "r[:, None] * columns", Race),
    ("outer", "for s in range(splits)", "for s in range(1)", WRONG),
    ("outer", "tl.trans(sum * scaling)", "tl.trans(sum)", WRONG),
    ("outer", "if tl.program_id(2) == 0:", "if tl.program_id(2) >= 0:", Race),
    ("outer", "sum += bias[:, None] * shift[None, :]", "sum += shift[None, :]", WRONG),
    ("outer", "tl.sum(weight * sum, 0)", "tl.sum(sum, 0)", WRONG),
]  # fmt: skip

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


def run(path: str) -> None:
    """Tails, several blocks of each kind, every activation, with and without the norm."""
    small = {"fused": (16, 32, 16, 4, 2), "contract": (16, 16, 16, 4, 2), "up": (16, 16, 16, 4, 2)}
    small |= {"fused_backward": small["fused"], "dx": small["up"], "outer": (16, 16, 16, 4, 2)}
    for name, tile in small.items():
        tiles._set[name] = tile
    with tiles.pinned(path):
        bottleneck_test.case("cpu", 5, 41, 20, torch.bfloat16, "gelu", norm=True)
        bottleneck_test.case("cpu", 17, 24, 9, torch.bfloat16, "silu", weight=torch.float32)
        bottleneck_test.case("cpu", 5, 24, 9, torch.float32, "tanh")
        bottleneck_test.case("cpu", 5, 24, 9, torch.float32, "relu", norm=True)
        bottleneck_test.case("cpu", 260, 17, 3, torch.bfloat16, "relu")


@pytest.fixture(autouse=True)
def _tiles():
    yield
    tiles._set.clear()


@pytest.mark.parametrize("path", tiles.PATHS)
def test_without_a_fault_nothing_is_found(path):
    run(path)


@pytest.mark.parametrize("file,old,new,found", FAULTS)
def test_a_fault_in_bottleneck_is_found(tmp_path, monkeypatch, file, old, new, found):
    install(monkeypatch, tmp_path, file, old, new)
    with pytest.raises(found):
        run("split" if file == "split" else "fused")
