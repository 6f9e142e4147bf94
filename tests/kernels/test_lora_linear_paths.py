"""Which path runs, why another does not, and what happens when the workspace does not fit."""

import pytest
import torch
from peft_engine.kernels.lora_linear import fill, paths, tiles
from peft_engine.kernels.lora_linear.backward import backward
from peft_engine.kernels.lora_linear.forward import forward

from peft_engine import dispatch
from peft_engine.activations import padded_empty, spare_width, with_spare
from peft_engine.ops.lora_linear import LORA_LINEAR, LoraLinearCall, lora_linear, refuse_unless_triton
from peft_engine.ops.nf4 import nf4_quantize


def call(device, rows=5, k=128, n=48, rank=4, dtype=torch.float32):
    x, dy = torch.randn(rows, k, dtype=dtype), torch.randn(rows, n, dtype=dtype)
    q = nf4_quantize(torch.randn(n, k, dtype=dtype))
    a, b = torch.randn(rank, k), torch.randn(n, rank)
    device = torch.device(device)
    q = q.to(device)
    x, dy, a, b = (t.to(device) for t in (x, dy, a, b))
    return x, dy, (q.packed, q.absmax, q.nested_absmax, q.offset, q.blocksize), a, b


@pytest.fixture
def no_room(monkeypatch):
    """Call it, and a workspace no longer fits."""

    def full(*arguments, **keywords):
        raise torch.OutOfMemoryError("CUDA out of memory")

    return lambda: [monkeypatch.setattr(fill, name, full) for name in ("forward", "backward", "weight")]


def test_without_memory_for_the_workspace_the_single_kernel_runs_and_explain_says_so(
    device, monkeypatch, no_room
):
    x, dy, base, a, b = call(device)
    want, h = forward(x, *base, 48, a, b, 0.5, None, 0.0, None)
    wanted = backward(dy, x, *base, a, b, h, 0.5, 0.0, None, True, True)
    monkeypatch.setattr(dispatch, "_notes", {})
    no_room()
    monkeypatch.setattr(paths, "SINGLE_ROWS", ())
    y, h = forward(x, *base, 48, a, b, 0.5, None, 0.0, None)
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)
    assert "the workspace of a 48 x 128 weight did not fit" in dispatch.noted("lora_linear")
    for got, expected in zip(
        backward(dy, x, *base, a, b, h, 0.5, 0.0, None, True, True), wanted, strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_without_memory_and_another_path_the_error_says_what_would_help(device, no_room):
    x, _, base, a, b = call(device, k=100)
    no_room()
    with pytest.raises(
        torch.OutOfMemoryError, match=r"100 input columns are no multiple of 64.*; free memory"
    ):
        forward(x, *base, 48, a, b, 0.5, None, 0.0, None)


def test_a_pinned_path_that_cannot_run_says_why(device):
    x, _, base, a, b = call(device)
    with (
        paths.pinned("few_rows"),
        pytest.raises(ValueError, match="path 'few_rows' is pinned but cannot run"),
    ):
        forward(x, *base, 48, a, b, 0.5, None, 0.0, None)
    with (
        pytest.raises(ValueError, match="expected one of few_rows, single, workspace, got 'fast'"),
        paths.pinned("fast"),
    ):
        pass


def test_the_single_kernel_runs_where_it_was_measured_to_win():
    def path(rows, dtype=torch.bfloat16, direction="forward", n=8192, rank=0, nf4=True):
        k = 64
        base = torch.empty(n * k // 2, dtype=torch.uint8), torch.empty(n) if nf4 else None, None, None, 64
        x = torch.empty(rows, k if direction == "forward" else n, dtype=dtype)
        gives = n if direction == "forward" else 8192
        return paths.choose(direction, x, base, gives, torch.empty(rank, k) if rank else None, 0.0)

    assert [path(rows) for rows in (1, 32, 33, 64, 65)] == ["workspace"] * 2 + ["single"] * 2 + ["workspace"]
    assert path(64, torch.float16) == "single"
    others = [{"dtype": torch.float32}, {"direction": "backward"}, {"n": 8191}, {"rank": 4}, {"nf4": False}]
    assert [path(64, **other) for other in others] == ["workspace"] * 5


def test_packed_bytes_that_begin_between_words_are_not_read_as_words(device):
    x, _, base, a, b = call(device)
    packed = torch.empty(base[0].numel() + 1, dtype=torch.uint8, device=device)[1:].copy_(base[0].flatten())
    odd = packed.view_as(base[0]), *base[1:]
    assert "do not begin at a multiple of 4" in paths.refuse("single", "forward", x, odd, 48, a, 0.0)
    with paths.pinned("single"), pytest.raises(ValueError, match="multiple of 4"):
        forward(x, *odd, 48, a, b, 0.5, None, 0.0, None)


def test_a_rank_above_the_tables_is_refused_with_a_reason_and_another_backend_runs():
    x = torch.randn(3, 64)
    rank = tiles.MAX_RANK + 1
    described = LoraLinearCall("cuda", torch.float32, torch.float32, torch.float32, 64, rank)
    assert f"rank {rank} is above {tiles.MAX_RANK}" in refuse_unless_triton(described)
    y = lora_linear(x, torch.randn(8, 64), torch.randn(rank, 64), torch.randn(8, rank), 1.0)
    assert y.shape == (3, 8)


def test_a_call_for_a_gpu_that_is_not_there_names_it():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    described = LoraLinearCall("cuda", torch.bfloat16, "nf4", torch.float32, 64, 4)
    refused = LORA_LINEAR.choose(described).refused
    assert refused["triton"] == "there is no CUDA device"
    assert refused["cuda"] == "there is no CUDA device"


def test_few_rows_refuses_what_it_has_no_kernel_for():
    q = nf4_quantize(torch.randn(8, 64))
    base = q.packed, q.absmax, None, None, 64

    def why(x, base=base, rank=4, p=0.0, direction="forward"):
        return paths.refuse("few_rows", direction, x, base, 8, torch.randn(rank, 64), p)

    class OnGpu(torch.Tensor):  # the rest of the reasons are told of tensors on a GPU
        is_cuda = True

    def on_gpu(*shape, dtype=torch.bfloat16):
        return torch.randn(*shape, dtype=dtype).as_subclass(OnGpu)

    assert why(torch.randn(2, 64)) == "the tensors are on cpu"
    assert why(on_gpu(2, 64), direction="backward") == "it has no backward"
    assert "dense" in why(on_gpu(2, 64), base=(torch.randn(8, 64), None, None, None, 0))
    assert "x is float32" in why(on_gpu(2, 64, dtype=torch.float32))
    assert why(on_gpu(65, 64)) == "it takes 1 to 64 rows, got 65"
    assert why(on_gpu(2, 64), rank=65) == "rank 65 is above 64"
    assert why(on_gpu(2, 64), p=0.1) == "it has no dropout"


def test_padded_activations_have_room_that_only_they_have():
    x = padded_empty(6, 64, 12, torch.bfloat16, "cpu")
    width = spare_width(12, torch.float32, torch.bfloat16)
    assert width == 3 * 16 and spare_width(12, torch.bfloat16, torch.bfloat16) == 16
    assert x.shape == (6, 64) and with_spare(x, width).shape == (6, 64 + width)
    assert with_spare(x.view(2, 3, 64).reshape(-1, 64), width) is not None
    assert with_spare(x[:3], width).data_ptr() == x.data_ptr()
    # another tensor's columns, a part of the columns, or more than there is room for
    assert with_spare(torch.randn(6, 128)[:, :64], width) is None
    assert with_spare(x[:, :32], width) is None and with_spare(x[:, 32:], width) is None
    assert with_spare(x, 128) is None


@pytest.mark.parametrize("padded", (True, False))
def test_what_lies_beside_the_spare_columns_is_not_touched(device, padded):
    """x itself, and rows of another tensor, after a product that writes h behind x."""
    x, _, base, a, b = call(device, rows=9, dtype=torch.bfloat16)
    if padded:
        x = padded_empty(9, 128, 4, torch.bfloat16, device).copy_(x)
    before = x.clone()
    with paths.pinned("workspace"):
        forward(x, *base, 48, a, b, 0.5, None, 0.0, None)
    assert torch.equal(x, before)


@pytest.mark.gpu
def test_a_qlora_layer_keeps_h_alone_of_its_own():
    """Memory after the forward, over x and y: h; the workspace is free again, and nothing else is saved."""
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    rows, k, n, rank = 2048, 1024, 1024, 16
    dense = torch.nn.Linear(k, k, bias=False, device="cuda", dtype=torch.bfloat16)
    q = nf4_quantize(torch.randn(n, k, device="cuda", dtype=torch.bfloat16), double_quant=True)
    a = torch.randn(rank, k, device="cuda", requires_grad=True)
    b = torch.randn(n, rank, device="cuda", requires_grad=True)
    x = dense(torch.randn(rows, k, device="cuda", dtype=torch.bfloat16))
    lora_linear(x, q, a, b, 2.0)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    saved = {}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = lora_linear(x, q, a, b, 2.0)
    kept = torch.cuda.memory_allocated() - before
    h = rows * rank * 4
    assert kept == y.numel() * 2 + h
    known = {t.untyped_storage().data_ptr() for t in (x, a, b, q.packed, q.absmax, q.nested_absmax, q.offset)}
    assert [size for at, size in saved.items() if at not in known] == [h]
