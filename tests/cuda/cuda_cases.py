"""Calls of the CUDA functions, checked: dequantise by its bits, the product by the accuracy rule."""

import ctypes
import functools

import cuda_on_cpu
import torch
from accuracy import assert_twice_as_good
from cuda_on_cpu import Huge

from peft_engine.ops.lora_linear import reference
from peft_engine.ops.nf4 import CODE, NF4Tensor, nf4_quantize, reference_dequantize

COUNTERS = 16384  # lora_linear_plan.cuh
TYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def blank(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    kind = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))


def scale_arguments(q: NF4Tensor) -> tuple:
    return q.packed, q.absmax, q.nested_absmax, q.offset, q.blocksize


def check_dequantize(
    target, rows, columns, dtype, *, blocksize=64, nested=True, gap=0, shift=0, scale=1.0, **settings
) -> None:
    """A (rows, columns) weight. `gap` elements lie between the rows of out, `shift` before the first."""
    q = nf4_quantize(torch.randn(rows, columns) * scale, blocksize=blocksize, double_quant=nested)
    stride = columns + gap
    memory = blank(shift + max(0, (rows - 1) * stride + columns), dtype=dtype)
    out = memory[shift:]
    call = (*scale_arguments(q), out, TYPE_CODES[dtype], rows, columns, stride, 0, 0)
    target.run(("pe_nf4_dequantize", *call), **settings)
    written = torch.zeros(memory.numel(), dtype=torch.bool)
    written[shift:].as_strided((rows, columns), (stride, 1), shift).fill_(True)
    got = memory.as_strided((rows, columns), (stride, 1), shift)
    what = (rows, columns, dtype, blocksize, nested, gap, shift, settings)
    assert same_bits(got, reference_dequantize(q, dtype)), what
    assert memory[~written].isnan().all(), f"written beside the rows: {what}"


@functools.cache
def kernels() -> cuda_on_cpu.Library:
    return cuda_on_cpu.Library(cuda_on_cpu.build(cuda_on_cpu.sources(), "library", level="-O1"))


def workspace(rows: int, n: int, k: int, rank: int, multiprocessors: int = 132) -> torch.Tensor:
    """Zeroed scratch of the size that the library asks for."""
    with cuda_on_cpu.settings(multiprocessors=multiprocessors):
        ask = kernels().dll.pe_lora_linear_workspace
        ask.restype = ctypes.c_int64
        integers = ctypes.c_int64(n), ctypes.c_int64(k)
        return torch.zeros(max(ask(rows, *integers, rank, 0), 0), dtype=torch.uint8)


def lora_operands(rows, k, n, rank, dtype, adapter, *, bias=True, gap=0, scale=1.0):
    """x (a gap after each row full of NaN), A, B, bias; the adapter weighs about as much as the base."""
    x = blank(rows, k + gap, dtype=dtype)[:, :k]
    x.copy_(torch.randn(rows, k) * scale)
    lora_a = lora_b = None
    if rank > 0:
        lora_a, lora_b = torch.randn(rank, k).to(adapter), (torch.randn(n, rank) / rank**0.5).to(adapter)
    return x, lora_a, lora_b, (torch.randn(n) * scale * k**0.5).to(dtype) if bias else None


def lora_call(q, x, lora_a, lora_b, scaling, bias, y, h, scratch, device=0, stream=0) -> tuple:
    rank, adapter = (0, torch.float32) if lora_a is None else (lora_a.shape[0], lora_a.dtype)
    rows, k = x.shape
    return (
        "pe_lora_linear_nf4", x, x.stride(0), rows, k, *scale_arguments(q), q.shape[0], lora_a, lora_b, rank,
        TYPE_CODES[adapter], float(scaling), bias, y, TYPE_CODES[x.dtype], h, scratch, device, stream,
    )  # fmt: skip


def check_lora(
    target, rows, k, n, rank, dtype, *, adapter=torch.float32, blocksize=64, nested=True, times=1,
    want_h=True, multiprocessors=132, bias=True, gap=0, scale=1.0, **settings,
) -> torch.Tensor:  # fmt: skip
    """y of one call, or of `times` after one with another x, all with one workspace; checked, h as well."""
    x, lora_a, lora_b, bias = lora_operands(rows, k, n, rank, dtype, adapter, bias=bias, gap=gap, scale=scale)
    q = nf4_quantize(torch.randn(n, k) * 0.5, blocksize=blocksize, double_quant=nested)
    scratch = workspace(rows, n, k, rank, multiprocessors)
    ys = [blank(rows, n, dtype=dtype) for _ in range(times)]
    h = blank(rows, rank) if want_h and rank > 0 else None
    calls = [lora_call(q, x, lora_a, lora_b, 0.75, bias, y, h, scratch) for y in ys]
    if times > 1:  # what it leaves in the workspace must not be taken for the others'
        other = lora_operands(rows, k, n, rank, dtype, adapter, gap=gap, scale=scale)[0]
        y = blank(rows, n, dtype=dtype)
        calls.insert(0, lora_call(q, other, lora_a, lora_b, 0.75, bias, y, None, scratch))
    target.run(*calls, multiprocessors=multiprocessors, **settings)

    what = (rows, k, n, rank, dtype, adapter, blocksize, nested, settings)
    wide = [None if t is None else t.double() for t in (x, lora_a, lora_b, bias)]
    exact = wide[0] @ reference_dequantize(q, torch.float64).T
    if rank > 0:
        exact_h = wide[0] @ wide[1].T
        exact = exact + 0.75 * exact_h @ wide[2].T
        if h is not None:
            terms = wide[0].abs() @ wide[1].abs().T
            assert_twice_as_good(h, x.float() @ lora_a.float().T, exact_h, terms, f"h of {what}")
    if wide[3] is not None:
        exact = exact + wide[3]
    plain = reference(x, q, lora_a, lora_b, 0.75, bias)
    for y in ys:
        assert_twice_as_good(y, plain, exact, what=f"y of {what}")
    assert all(same_bits(y, ys[0]) for y in ys), f"another y the second time: {what}"
    assert not scratch[: 4 * COUNTERS].any(), f"the counters are not as they were found: {what}"
    return ys[0]


# --- beyond 32 bits: windows of huge buffers, the last blocks of huge grids ---------------------------------


def check_huge_dequantize(target, rows, columns, gap, least) -> None:
    """The last two thread blocks write at least `least` weights."""
    numel, tail = rows * columns, 2**16
    packed = torch.randint(0, 256, (tail // 2,), dtype=torch.uint8)
    absmax = torch.rand(tail // 64) + 0.5
    out = blank(tail, dtype=torch.bfloat16)
    elements = (rows - 1) * (columns + gap) + columns
    first_byte, first_block = (numel + 1) // 2 - tail // 2, -(-numel // 64) - tail // 64
    first = elements - tail
    target.run(
        (
            "pe_nf4_dequantize",
            Huge(first_byte + tail // 2, {first_byte: packed}),
            Huge(4 * first_block + tail // 16, {4 * first_block: absmax}),
            *(None, None, 64, Huge(2 * elements, {2 * first: out}), TYPE_CODES[out.dtype]),
            *(rows, columns, columns + gap, 0, 0),
        ),
        last=2,
    )
    # Of the weights whose bytes and scale lie in the windows, those whose place in out does as well.
    weight = torch.arange(numel - tail + 64, numel)
    place = weight + weight // columns * gap - first
    weight, place = weight[place >= 0], place[place >= 0]
    byte = packed[weight // 2 - first_byte]
    index = torch.where(weight % 2 == 0, byte >> 4, byte & 15).int()
    want, got = (CODE[index] * absmax[weight // 64 - first_block]).bfloat16(), out[place]
    there = ~got.isnan()
    assert there[-1] and there.sum() >= least, "the end was not written"
    assert same_bits(got[there], want[there])


def check_huge_weight(target, rows=1, k=8192, n=2**19 + 256) -> None:
    """The blocks of the last tile run; its rows of W lie more than 2^31 bytes from the first."""
    many = 4000  # multiprocessors: short runs of work
    x = torch.randn(rows, k).half()
    last = nf4_quantize(torch.randn(128, k), blocksize=64)
    packed, absmax = last.packed.flatten(), last.absmax
    y = [blank(128, dtype=torch.float16) for _ in range(rows)]  # the ends of y's rows
    packed_bytes, absmax_bytes = n * k // 2, n * k // 64 * 4
    target.run(
        (
            *("pe_lora_linear_nf4", x, k, rows, k),
            Huge(packed_bytes, {packed_bytes - packed.numel(): packed}),
            Huge(absmax_bytes, {absmax_bytes - 4 * absmax.numel(): absmax}),
            *(None, None, 64, n, None, None, 0, 0, 1.0, None),
            Huge(2 * n * rows, {2 * (n * (i + 1) - 128): y[i] for i in range(rows)}),
            *(TYPE_CODES[x.dtype], None, workspace(rows, n, k, 0, many), 0, 0),
        ),
        multiprocessors=many,
        last=5,
    )
    exact = x.double() @ reference_dequantize(last, torch.float64).T
    assert_twice_as_good(torch.stack(y), x @ reference_dequantize(last, torch.float16).T, exact)


def check_far_rows(target, rows=3, k=64, n=24, rank=4) -> None:
    """The last row of x lies more than 2^31 elements from the first."""
    stride = 2**31 // (rows - 1) // 8 * 8 + 8
    x, lora_a, lora_b, bias = lora_operands(rows, k, n, rank, torch.bfloat16, torch.float32)
    q = nf4_quantize(torch.randn(n, k))
    y, h = blank(rows, n, dtype=torch.bfloat16), blank(rows, rank)
    call = list(lora_call(q, x, lora_a, lora_b, 1.0, bias, y, h, workspace(rows, n, k, rank)))
    windows = {2 * i * stride: x[i].clone() for i in range(rows)}
    call[1:3] = Huge(2 * ((rows - 1) * stride + k), windows), stride
    target.run(tuple(call))
    wide = [t.double() for t in (x, lora_a, lora_b, bias)]
    exact = wide[0] @ reference_dequantize(q, torch.float64).T + wide[3] + wide[0] @ wide[1].T @ wide[2].T
    assert_twice_as_good(y, reference(x, q, lora_a, lora_b, 1.0, bias), exact)
