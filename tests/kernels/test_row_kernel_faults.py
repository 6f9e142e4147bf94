"""Faults planted in the Triton kernels of rms_norm, swiglu, rotary, dora_linear and the loss are found, each
by the interpreter or by the answer.
"""

import importlib

import faulty
import pytest
import test_dora_linear_triton as dora_test
import test_linear_cross_entropy_triton as loss_test
import test_rms_norm_triton as norm_test
import test_rotary_triton as rotary_test
import test_swiglu_triton as swiglu_test
import torch
from triton_interpreter import OutOfBounds, Race

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="the mended interpreter is for CPU tensors"),
    pytest.mark.filterwarnings(
        "ignore:overflow encountered", "ignore:divide by zero", "ignore:invalid value encountered"
    ),
]
WRONG = AssertionError
NORM, ROTARY, DORA, LOSS = "rms_norm", "rotary", "dora_linear", "linear_cross_entropy"
HALF, WHOLE = torch.bfloat16, torch.float32


def _tensors(*shape, count):
    return [torch.randn(shape) for _ in range(count)]


def _heads(heads_q, heads_k, head_dim, rotated):
    q, k = (torch.randn(2, 3, heads, head_dim) for heads in (heads_q, heads_k))
    rotary_test.check("cpu", q, k, *rotary_test.angles(2, 3, rotated, WHOLE))


# The smallest calls that show the faults.
CASES = {
    "norm": lambda: norm_test.check("cpu", 35, 65, WHOLE, WHOLE, 1.0, 1.0),
    "shares": lambda: norm_test.check("cpu", 600, 33, WHOLE, WHOLE),
    "long": lambda: norm_test.test_a_row_longer_than_a_tile_is_read_twice("cpu", HALF, pytest.MonkeyPatch()),
    "swiglu": lambda: swiglu_test.check("cpu", *_tensors(3, 1030, count=3), "swiglu"),
    "gelu_tanh": lambda: swiglu_test.check("cpu", *_tensors(3, 1030, count=3), "geglu", "gelu_tanh"),
    "gelu": lambda: swiglu_test.check("cpu", *_tensors(3, 1030, count=3), "geglu", "gelu"),
    "gelu, far": lambda: swiglu_test.test_far_tails_saturate("cpu", "gelu_tanh"),
    "halves": lambda: swiglu_test.test_halves_of_one_row_are_read_in_place("cpu", 1500),
    "heads": lambda: _heads(5, 3, 20, 12),
    "tiles": lambda: rotary_test.test_many_heads_take_several_tiles("cpu", pytest.MonkeyPatch()),
    "dora": lambda: dora_test.check("cpu", 130, 270, WHOLE),
    "zero": lambda: dora_test.test_a_norm_of_zero_gives_zero("cpu"),
    "loss": lambda: loss_test.test_losses_and_gradients_are_within_twice_the_reference_error(
        "cpu", WHOLE, 3, 9001
    ),
    "behind": lambda: (
        loss_test.test_what_lies_behind_a_row_changes_nothing_and_is_written_where_it_is_nobodys(
            "cpu", 2, 4101
        )
    ),
    "apart": lambda: loss_test.test_rows_that_lie_apart_are_read_in_place("cpu"),
    "infinite": lambda: loss_test.test_logits_of_minus_infinity_have_no_probability_and_nan_stays_nan("cpu"),
    "label": lambda: loss_test.test_a_label_outside_of_the_vocabulary_gives_nan_and_reads_nothing("cpu"),
}

# op, file, the call, what is replaced, by what, how it is found
FAULTS = [
    # masks
    (NORM, "forward", "norm", "inside = row < rows", "inside = row < rows + 1", OutOfBounds),
    (NORM, "forward", "long", "(n < COLUMNS)[None", "(n >= 0)[None", OutOfBounds),
    (NORM, "forward", "norm", "there = n < COLUMNS", "there = n < COLUMNS + 1", OutOfBounds),
    (NORM, "backward", "norm", "tl.minimum(rows, first + share)", "first + share", OutOfBounds),
    # the sum, eps, the offset, a second reading left out
    (NORM, "forward", "long", "squares += tl.sum(", "squares = tl.sum(", WRONG),
    (NORM, "forward", "norm", "squares / COLUMNS", "squares / BLOCK_N", WRONG),
    (NORM, "forward", "norm", "variance * scale * scale", "variance * scale", WRONG),
    (NORM, "forward", "norm", "factor = offset + ", "factor = ", WRONG),
    (NORM, "forward", "long", "if BLOCKS > 1:", "if BLOCKS > 9:", WRONG),
    (NORM, "backward", "norm", "mean = products / COLUMNS", "mean = products", WRONG),
    (NORM, "backward", "norm", "(g - normal * mean[:, None])", "g", WRONG),
    (NORM, "backward", "long", "if BLOCKS > 1:", "if BLOCKS > 9:", WRONG),
    # shares of the rows: one place for all, only the first added
    (NORM, "backward", "shares", "tl.program_id(1).to(tl.int64) * columns + n, tl.sum", "n, tl.sum", Race),
    (NORM, "backward", "shares", "for s in range(shares)", "for s in range(1)", WRONG),
    (NORM, "backward", "norm", "tl.load(rstd + row, inside, other=0.0)[:, None]", "1.0", WRONG),
    ("swiglu", "forward", "swiglu", "row, n, n < columns", "row, n, n < columns + 1", OutOfBounds),
    ("swiglu", "forward", "swiglu", "% chunks).to(tl.int64) * BLOCK", "% chunks).to(tl.int64) * 0", Race),
    ("swiglu", "forward", "halves", "gate + row * stride_g", "gate + row * stride_y", WRONG),
    ("swiglu", "forward", "swiglu", "out = g * part(", "out = part(", WRONG),
    ("swiglu", "forward", "gelu_tanh", "(1.0 + 0.044715 * g * g)", "(1.0 + 0.044715 * g)", WRONG),
    ("swiglu", "backward", "gelu, far", "tl.where(g > 12.0, 12.0, g)", "g", WRONG),
    ("swiglu", "forward", "gelu", "g * 0.7071067811865476", "g * 0.7", WRONG),
    ("swiglu", "backward", "swiglu", "s * (1.0 + g * (1.0 - s))", "s * (1.0 + g * s)", WRONG),
    ("swiglu", "backward", "gelu_tanh", "0.2140644488178084", "0.0713548", WRONG),
    ("swiglu", "backward", "gelu", "-0.5 * g * g", "-0.5 * g", WRONG),
    ("swiglu", "backward", "swiglu", "(d * g * s)", "(d * g)", WRONG),
    ("swiglu", "backward", "halves", "up + row * stride_u", "up + row * stride_du", WRONG),
    (ROTARY, "rotate", "heads", "(h < HEADS)[:, None] & (d", "(h >= 0)[:, None] & (d", Race),
    (ROTARY, "rotate", "heads", "y1 = x1 * c1 - x2 * s1", "y1 = x1 * c1 - x2 * s2", WRONG),
    (ROTARY, "rotate", "heads", "y1 = x1 * c1 + x2 * s2", "y1 = x1 * c1 - x2 * s2", WRONG),
    (ROTARY, "rotate", "heads", "if REST > 0", "if REST > 99", WRONG),
    (ROTARY, "rotate", "heads", "b * stride_cb + t *", "t *", WRONG),
    (ROTARY, "rotate", "tiles", "range(0, HEADS, BLOCK_H)", "range(0, BLOCK_H, BLOCK_H)", WRONG),
    (ROTARY, "rotate", "heads", "k + b * stride_kb", "k + b * stride_qb", OutOfBounds),
    # factors, the bias, shares of the rows
    (DORA, "forward", "dora", "(row < rows)[:, None]", "(row < rows + 1)[:, None]", OutOfBounds),
    (DORA, "forward", "dora", "there = n < columns", "there = n < columns + 1", (OutOfBounds, Race)),
    (DORA, "forward", "dora", "% blocks * BLOCK_N", "% blocks * 0", Race),
    (DORA, "forward", "dora", "if HAS_BIAS:", "if not HAS_BIAS:", WRONG),
    (DORA, "forward", "zero", "tl.maximum(tl.load(norm + n, there, other=1.0), TINY)",
     "tl.load(norm + n, there, other=1.0)", WRONG),
    (DORA, "backward", "dora", "(gradient * factor)", "gradient", WRONG),
    (DORA, "backward", "dora", "tl.minimum(rows, first + share)", "first + share", (OutOfBounds, Race)),
    (DORA, "backward", "dora", "sum += gradient *", "sum = gradient *", WRONG),
    (DORA, "backward", "dora", "tl.program_id(1).to(tl.int64) * columns + n, tl.sum", "n, tl.sum", Race),
    (DORA, "backward", "dora", "for s in range(shares)", "for s in range(1)", WRONG),
    (DORA, "backward", "dora", "sum / tl.maximum", "sum * tl.maximum", WRONG),
    # the running maximum and sum
    (LOSS, "rows", "loss", "sum = sum * tl.exp(top - base) + ", "sum = sum + ", WRONG),
    (LOSS, "rows", "loss", "tl.maximum(top, tl.max(tile, 1))", "tl.max(tile, 1)", WRONG),
    (LOSS, "rows", "loss", "tl.sum(sum * tl.exp(top - base), 0)", "tl.sum(sum, 0)", WRONG),
    (LOSS, "rows", "infinite", 'tl.where(higher == float("-inf"), 0.0, higher)', "higher", WRONG),
    (LOSS, "rows", "loss", "j < end, other", "j < end + 1, other", OutOfBounds),
    (LOSS, "rows", "behind", "tl.where(j < columns, tile, float(\"-inf\"))", "tile", WRONG),
    (LOSS, "rows", "label", "(label >= 0) & (label < columns)", "label >= 0", OutOfBounds),
    (LOSS, "rows", "loss", "tl.where(j == label, p - 1.0, p)", "p", WRONG),
    (LOSS, "rows", "loss", "factor = tl.load(scale + row)", "factor = 1.0", WRONG),
    (LOSS, "rows", "apart", "logits += row * stride", "logits += row * columns", WRONG),
    (LOSS, "columns", "loss", "(labels + row) - first_column", "(labels + row)", WRONG),
    (LOSS, "columns", "loss", "stats + 2 * row + 1", "stats + 2 * row", WRONG),
    (LOSS, "columns", "loss", "there = j < columns", "there = j < columns + 1", (OutOfBounds, Race)),
    (LOSS, "columns", "loss", "% chunks * BLOCK", "% chunks * 0", Race),
]  # fmt: skip

# Who calls a file's functions: the test modules, and the kernels that share its helpers.
USERS = {
    "rms_norm": (norm_test, "forward", "backward"),
    "swiglu": (swiglu_test, "forward", "backward"),
    "rotary": (rotary_test, "rotate"),
    "dora_linear": (dora_test, "forward", "backward"),
    "linear_cross_entropy": (loss_test, "cross_entropy_rows", "cross_entropy_columns"),
}


@pytest.mark.parametrize("name", CASES)
def test_without_a_fault_nothing_is_found(name):
    CASES[name]()


@pytest.mark.parametrize("op,file,name,old,new,found", FAULTS)
def test_a_fault_in_a_row_kernel_is_found(tmp_path, monkeypatch, op, file, name, old, new, found):
    copy = faulty.plant(importlib.import_module(f"peft_engine.kernels.{op}.{file}"), tmp_path, old, new)
    user, *functions = USERS[op]
    for function in functions:
        if hasattr(copy, function):
            monkeypatch.setattr(user, function, getattr(copy, function))
    if hasattr(user, "module") and file != "backward":
        monkeypatch.setattr(user, "module", copy)
    torch.manual_seed(0)
    with pytest.raises(found):
        CASES[name]()
