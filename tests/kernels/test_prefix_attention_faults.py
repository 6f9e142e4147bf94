"""Faults planted in prefix_attention's Triton kernels are found, each by the interpreter or by the answer."""

import importlib

import faulty
import pytest
import test_prefix_attention_triton as prefix_test
import torch
from triton_interpreter import OutOfBounds, Race

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the mended interpreter is for CPU tensors")

WRONG = AssertionError
PACKAGE = "peft_engine.kernels.prefix_attention"


def causal(**changes):
    prefix_test.check(*prefix_test.case(**changes), prefix_test.CAUSAL)


def masked(kind, **changes):
    ends = prefix_test.intervals(kind, 2, 19, 37)
    prefix_test.check(*prefix_test.case(keys=37, **changes), (*ends, None, False))


def halved():
    causal(dtype=torch.bfloat16)


def window():
    masked("window")


def scattered(prefix=5):
    """Every query sees all keys, but some in between see none."""
    first, last = torch.zeros(2, 19, dtype=torch.int32), torch.full((2, 19), 37, dtype=torch.int32)
    last[:, 3::5] = 0
    given = prefix_test.case(keys=37, prefix=prefix, dtype=torch.bfloat16)
    prefix_test.check(*given, (first, last, None, False))


def sparse():
    scattered(prefix=0)


def biased():
    masks = None, None, prefix_test.added(1, 2, 19, 37), False
    prefix_test.check(*prefix_test.case(keys=37, dtype=torch.bfloat16), masks)


def split():
    causal(queries=1, keys=90, dtype=torch.bfloat16)


def many_rows():
    causal(queries=130, keys=5, head_dim=16)


def with_dropout():
    prefix_test.check(
        *prefix_test.case(heads=4, kv_heads=2), prefix_test.CAUSAL, dropout=prefix_test.dropped()
    )


def capped(**changes):
    prefix_test.check(*prefix_test.case(size=2.0, **changes), prefix_test.CAUSAL, softcap=2.0)


def capped_halves():
    capped(dtype=torch.bfloat16)


# file, what is replaced, by what, how it is found, by which check
FAULTS = [
    # a mask dropped: of keys beyond the last, causal, intervals, bias, rows beyond the last
    ("forward", "tl.minimum(n, end - 1) if MASKED else n", "n", (OutOfBounds, WRONG), causal),
    ("parts", "(n >= a) & (n < z)", "(n < z)", WRONG, window),
    ("parts", "(n >= a) & (n < z)", "(n >= a)", WRONG, causal),
    ("parts", "s += added if EXACT else added * LOG2_E", "s += added", WRONG, biased),
    ("parts", "row = tl.minimum(row, queries * GROUP - 1)", "row = row + 0", OutOfBounds, causal),
    ("forward", "there[:, None] & (d < HEAD_DIM)[None, :]", "there[:, None]", (Race, OutOfBounds), causal),
    ("dkv", "tl.where(m < queries * GROUP, lse_of, float(\"inf\"))", "lse_of", WRONG, causal),
    # who sees what, by blocks: one too few, one too many
    ("parts", "= tl.cdiv(tl.maximum(end - start, 0), BLOCK)", "= (end - start) // BLOCK", WRONG, causal),
    ("parts", "tl.minimum(whole_end, end) - start", "end - start", WRONG, halved),
    ("dkv", "tl.sum(number, 0) == all_to - all_from", "tl.sum(number, 0) >= 0", WRONG, scattered),
    ("dkv", "(a < end) & (z > start) & (a < z)", "(a < start) & (z > start)", WRONG, window),
    # the prefix: left out of the softmax, its gradient not summed over shares or the batch
    ("forward", "end = tl.minimum(begin + chunk, prefix)", "end = start", WRONG, causal),
    ("dkv", "for p in range(parts):", "for p in range(1):", WRONG, many_rows),
    ("dkv", "cdiv(prefix, block_n), q.shape[0] // copies", "cdiv(prefix, block_n), 1", WRONG, causal),
    ("dkv", "tl.program_id(1).to(tl.int64) * stride_s", "tl.program_id(1).to(tl.int64) * 0", Race, many_rows),
    ("dkv", "batch = copy * per_copy + i // each", "batch = copy * per_copy", WRONG, causal),
    # the programs: a tile that two have, in the order for few
    ("parts", "tl.where(few, pid % heads, pid // tiles)", "tl.where(few, pid % tiles, pid // tiles)",
     (Race, OutOfBounds, WRONG), causal),
    # the gradients
    ("dq", "p * (dp - delta[:, None])", "p * dp", WRONG, causal),
    ("dkv", "p * (dp - delta[None, :])", "p * dp", WRONG, causal),
    ("dkv", "(dk_sum * scale)", "(dk_sum * scale * 1.01)", WRONG, causal),
    ("dkv", "h * queries + t", "head * GROUP * queries + t", WRONG, causal),
    ("parts", "tl.where(lse == float(\"-inf\"), float(\"inf\"), lse)", "lse + 0.0", WRONG, sparse),
    # dropout: the mask or its scale dropped, the mask of another row, another column, another seed
    ("forward", "p = tl.where(kept(row_key[:, None], (column + n)[None, :], threshold), p, 0.0)", "p += 0.0",
     WRONG, with_dropout),
    ("forward", "acc *= inverse_keep", "acc *= 1.0", WRONG, with_dropout),
    ("forward", "batch * stride_lb + h * queries + t)", "h * queries + t)", WRONG, with_dropout),
    ("dq", "dp = tl.where(keep, dp * inverse_keep, 0.0)", "dp = dp * inverse_keep", WRONG, with_dropout),
    ("dq", "dp * inverse_keep, 0.0)", "dp, 0.0)", WRONG, with_dropout),
    ("dq", "row_keys(seed, at)", "row_keys(seed, at + 1)", WRONG, with_dropout),
    ("dkv", "tl.where(keep, p * inverse_keep, 0.0)", "p * inverse_keep", WRONG, with_dropout),
    ("dkv", "tl.where(keep, p * inverse_keep, 0.0)", "tl.where(keep, p, 0.0)", WRONG, with_dropout),
    ("dkv", "row_keys(seed, row0 + row)", "row_keys(seed, row)", WRONG, with_dropout),
    ("dkv", "column = prefix + n", "column = n + 0", WRONG, with_dropout),
    ("dkv", "row_keys(seed, row)", "row_keys(seed, row - batch * stride_lb)", WRONG, with_dropout),
    ("parts", "(bits >> 32)", "(bits >> 31)", WRONG, with_dropout),
    ("parts", "(row >> 32)", "(row >> 1)", WRONG, with_dropout),
    # the cap: of another height, dropped with float32's digits, its slope dropped in either gradient
    ("parts", "cap = softcap if EXACT else softcap * LOG2_E", "cap = softcap", WRONG, capped_halves),
    ("parts", "scale * (2.0 * LOG2_E) / softcap", "scale * LOG2_E / softcap", WRONG, capped_halves),
    ("parts", "capped = tanh(s)", "capped = s", WRONG, capped),
    ("parts", "slope = 1.0 - capped * capped", "slope = 1.0 - capped", WRONG, capped),
    ("dq", "ds *= slope", "ds *= 1.0", WRONG, capped),
    ("dkv", "ds *= slope", "ds *= 1.0", WRONG, capped),
    ("call", "return self.softcap or None", "return 2.0 * self.softcap or None", WRONG, capped),
    # the split keys: not merged by their weights; two programs at one place
    ("forward", "weight = tl.exp(of - base)", "weight = tl.exp(of - of)", WRONG, split),
    ("forward", "program_id(1).to(tl.int64) * stride_oc", "program_id(1).to(tl.int64) * 0", Race, split),
]  # fmt: skip
USERS = ("forward", "dq", "dkv", "backward")


@pytest.mark.parametrize("file,old,new,found,check", FAULTS)
def test_a_fault_in_prefix_attention_is_found(tmp_path, monkeypatch, file, old, new, found, check):
    module = importlib.import_module(f"{PACKAGE}.{file}")
    copy = faulty.plant(module, tmp_path, old, new)
    for user in (importlib.import_module(f"{PACKAGE}.{name}") for name in USERS):
        for name, value in vars(copy).items():
            if getattr(user, name, None) is getattr(module, name, copy) and user is not module:
                monkeypatch.setattr(user, name, value)
    if file == "forward":
        monkeypatch.setattr(prefix_test, "forward", copy.forward)
    monkeypatch.setattr(prefix_test.tiles, "CHUNK", 48)
    with prefix_test.small_tiles(), pytest.raises(found):
        check()


def test_an_offset_in_32_bits_is_found(tmp_path, monkeypatch):
    module = importlib.import_module(f"{PACKAGE}.parts")
    copy = faulty.plant(module, tmp_path, "n.to(tl.int64)[:, None] * stride", "n[:, None] * stride")
    forward = importlib.import_module(f"{PACKAGE}.forward")
    monkeypatch.setattr(forward, "block", copy.block)
    with pytest.raises(OutOfBounds):
        prefix_test.check_far_keys(forward.forward, monkeypatch)
