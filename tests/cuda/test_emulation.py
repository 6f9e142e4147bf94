"""The emulation is tested by small kernels (toys.cu): right on it, and with planted faults that are found."""

import cuda_on_cpu
import pytest
import torch
from cuda_on_cpu import BadAccess, LaunchFailed, Library, Program, Race
from planted import Fault

DEFINES = ("-DPE_TOYS",)  # which functions harness.cpp calls
KINDS = ("library", "plain", "address", "thread")


@pytest.fixture(scope="module")
def toys() -> Library:
    """toys.cu, in this process."""
    return Library(cuda_on_cpu.build(cuda_on_cpu.TOYS, "library", defines=DEFINES))


@pytest.fixture(params=KINDS)
def target(request, toys):
    """toys.cu built in each way."""
    if request.param == "library":
        return toys
    return Program(cuda_on_cpu.build(cuda_on_cpu.TOYS, request.param, defines=DEFINES), request.param)


def blank(*shape: int) -> torch.Tensor:
    return torch.full(shape, float("nan"))


def check_sum(target, **settings) -> None:
    x = torch.randint(-8, 8, (700,)).float()
    partial, counter, out = blank(6), torch.zeros(1, dtype=torch.int32), blank(1)
    for _ in range(2):  # the counter is left as it was found
        out.fill_(float("nan"))
        target.run(("toy_sum", x, partial, counter, out, 700), **settings)
        assert out.item() == x.sum().item()


def check_transpose(target, **settings) -> None:
    x, out = torch.randn(17, 30), blank(30, 17)
    target.run(("toy_transpose", x, out, 17, 30), **settings)
    assert torch.equal(out, x.T)


def check_warp(target, **settings) -> None:
    x, out, votes = torch.randint(-8, 8, (32,)).float(), blank(5, 32), torch.zeros(2, 32, dtype=torch.int32)
    target.run(("toy_warp", x, out, votes), **settings)
    lanes = torch.arange(32)
    assert (out[0] == x.sum()).all()
    assert torch.equal(out[1], x[(lanes - 1).clamp(min=0)])
    assert torch.equal(out[2], x[torch.where(lanes % 8 + 3 < 8, lanes + 3, lanes)])
    assert torch.equal(out[3], x[lanes // 16 * 16 + 5])
    assert torch.equal(out[4], x.flip(0))
    ballot = sum(1 << i for i in range(32) if x[i] > 0)
    halves = torch.where(lanes < 16, ballot & 0xFFFF, ballot & 0xFFFF0000)
    assert torch.equal(votes[0].long() & 0xFFFFFFFF, (ballot + halves) & 0xFFFFFFFF)
    assert (votes[1] == 2).all(), "some are positive, not all"


def check_histogram(target, **settings) -> None:
    x, out = torch.randint(0, 16, (300,), dtype=torch.int32), torch.zeros(16, dtype=torch.int32)
    target.run(("toy_histogram", x, out, 300), **settings)
    assert torch.equal(out.long(), x.bincount(minlength=16))


def check_pipeline(target, **settings) -> None:
    x, out = torch.randint(-8, 8, (5, 128, 4)).float(), blank(128)
    target.run(("toy_pipeline", x, out, 5), **settings)
    assert torch.equal(out, x.sum((0, 2)).roll(-1))


def check_wide(target, **settings) -> None:
    x, out = torch.randint(-8, 8, (5, 8)).float(), blank(5)
    target.run(("toy_wide", x, out, 8, 5), **settings)
    assert torch.equal(out, x[:, :4].sum(1))


def check_relay(target, **settings) -> None:
    x, out = torch.randint(-8, 8, (7,)).float(), blank(7)
    settings = {"multiprocessors": 2, **settings}
    target.run(("toy_relay", x, out, torch.zeros(2, dtype=torch.int32), 7), **settings)
    assert torch.equal(out, x.cumsum(0))


def check_leave(target, **settings) -> None:
    x, out = torch.randn(70), blank(128)
    target.run(("toy_leave", x, out, 70), **settings)
    assert torch.equal(out[:70], x.flip(0)) and out[70:].isnan().all()


CHECKS = {
    "sum": check_sum,
    "transpose": check_transpose,
    "warp": check_warp,
    "histogram": check_histogram,
    "pipeline": check_pipeline,
    "wide": check_wide,
    "relay": check_relay,
    "leave": check_leave,
}


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_a_toy_is_right_and_nothing_is_reported(target, check):
    check(target)


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_a_toy_is_right_in_any_order_of_blocks_and_threads(toys, check):
    for seed in range(1, 6):
        check(toys, seed=seed)
        check(toys, seed=seed, blocks=3)


def _packed(values: torch.Tensor) -> torch.Tensor:
    """Pairs of 16-bit floats as words, the first in the low half."""
    return values.contiguous().view(torch.int32)


# PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type" and "for mma.m16n8k8": as it is there,
# for element i of lane `lane` of A (m x k), B (k x n) and C (m x n).
def row_and_column(operand: str, k: int, lane: int, i: int) -> tuple[int, int]:
    group, inside = lane >> 2, lane % 4
    if operand == "A" and k == 16:
        row = group if 0 <= i < 2 or 4 <= i < 6 else group + 8
        return row, inside * 2 + (i & 1) if i < 4 else inside * 2 + (i & 1) + 8
    if operand == "A":
        return group if i < 2 else group + 8, inside * 2 + (i & 1)
    if operand == "B":
        return inside * 2 + (i & 1) + (8 if i >= 2 else 0), group
    return group if i < 2 else group + 8, inside * 2 + (i & 1)


@pytest.mark.parametrize(
    "kind,dtype,k", [(0, torch.bfloat16, 16), (1, torch.float16, 16), (2, torch.float16, 8)]
)
def test_mma_has_the_documented_layout(toys, kind, dtype, k):
    a, b, c = torch.randn(16, k).to(dtype), torch.randn(k, 8).to(dtype), torch.randn(16, 8)
    counts = {"A": k // 2, "B": k // 4, "C": 4}
    operands = {"A": (a, torch.zeros(32, 8, dtype=dtype)), "B": (b, torch.zeros(32, 4, dtype=dtype))}
    operands["C"] = (c, torch.zeros(32, 4))
    for name, (matrix, fragments) in operands.items():
        places = {row_and_column(name, k, lane, i) for lane in range(32) for i in range(counts[name])}
        assert len(places) == matrix.numel(), "each element once"
        for lane in range(32):
            for i in range(counts[name]):
                fragments[lane, i] = matrix[row_and_column(name, k, lane, i)]
    d = blank(32, 4)
    toys.run(("toy_mma", kind, _packed(operands["A"][1]), _packed(operands["B"][1]), operands["C"][1], d))
    got = blank(16, 8)
    for lane in range(32):
        for i in range(4):
            got[row_and_column("C", k, lane, i)] = d[lane, i]
    exact = a.double() @ b.double() + c.double()
    magnitude = a.double().abs() @ b.double().abs() + c.double().abs()
    assert ((got.double() - exact).abs() <= k * torch.finfo(torch.float32).eps * magnitude).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_floats_are_rounded_as_torch_rounds_them(toys, dtype):
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    x = bits.view(dtype).float()
    near = torch.cat(
        (x, torch.nextafter(x, x + 1e30), torch.nextafter(x, x - 1e30), x * 1.0003, x + x.abs() * 2**-9)
    )
    near = torch.cat((near, torch.randn(10000) * 10.0 ** torch.randint(-12, 6, (10000,))))
    out = torch.zeros(near.numel(), dtype=dtype)
    back = blank(near.numel())
    toys.run(("toy_round", 1 if dtype == torch.float16 else 2, near, out, back, near.numel()))
    want = near.to(dtype)
    nan = want.isnan()
    assert torch.equal(out.isnan(), nan) and torch.equal(out[~nan], want[~nan])
    assert torch.equal(back[~nan], want[~nan].float())


# What, the toy, the program that must find it, old, new, how it is found.
FAULTS = [
    ("no barrier before the tree", "sum", "thread", "0.0f;\n  __syncthreads();\n  for", "0.0f;\n  for",
     Race),
    ("no barrier in the tree", "sum", "thread", "thread + half];\n    __syncthreads();", "thread + half];",
     Race),
    ("no barrier before the fence", "sum", "thread", "  __syncthreads();  // before the fence\n", "", Race),
    ("no release fence", "sum", "thread", "__threadfence();  // release", "", Race),
    ("no acquire fence", "sum", "thread", "__threadfence();  // acquire", "", Race),
    ("a counter that is no atomic", "sum", "thread", "atomicAdd(counter, 1u)", "(*counter)++", Race),
    ("a plain read of the counter", "sum", "thread", "= before ==", "= *counter + before - before ==", Race),
    ("counter not reset", "sum", "plain", "    *counter = 0;\n", "", AssertionError),
    ("a block of the grid missing", "sum", "plain",
     "(sum, static_cast<unsigned>((n + kThreads - 1) / kThreads)",
     "(sum, static_cast<unsigned>(n / kThreads)", AssertionError),
    ("one float too far", "sum", "address", "i < n ?", "i <= n ?", BadAccess),
    ("shared memory one float too far", "sum", "address", "values[thread] = i", "values[thread + 1] = i",
     BadAccess),
    ("shared memory nobody wrote", "sum", "plain", "values[thread] = i < n",
     "if (i < n) values[thread] = i < n", AssertionError),
    ("no barrier in the transpose", "transpose", "thread", "  __syncthreads();\n  if (column",
     "  if (column", Race),
    ("no barrier, in some order", "transpose", "plain", "  __syncthreads();\n  if (column", "  if (column",
     AssertionError),
    ("a tail not masked", "transpose", "address", "if (row + i < rows && column + j < columns) tile", "tile",
     BadAccess),
    ("two blocks write one tile", "transpose", "thread", "(blockIdx.x) * 16", "(blockIdx.x) * 0", Race),
    ("no warp barrier", "warp", "thread", "  __syncwarp();\n", "", Race),
    ("a mask without the caller", "warp", "plain", "if (lane < 16) votes", "if (lane < 17) votes",
     LaunchFailed),
    ("lanes in different collectives", "warp", "plain", "__any_sync(all,",
     "__any_sync(lane < 1 ? all : 0xfffffffeu,", LaunchFailed),
    ("a lane that does not come", "warp", "plain", "  votes[lane] = ",
     "  if (lane == 9) return;\n  votes[lane] = ", LaunchFailed),
    ("shared atomics without a barrier", "histogram", "thread",
     "  __syncthreads();\n  if (thread < 16) atomicAdd", "  if (thread < 16) atomicAdd", Race),
    ("shared counts not zeroed first", "histogram", "thread", "  __syncthreads();\n  const int i",
     "  const int i", Race),
    ("no wait for the copies", "pipeline", "plain", "    pe_cpu::cp_async_wait<1>();\n", "", AssertionError),
    ("a wait for the wrong group", "pipeline", "plain", "cp_async_wait<1>", "cp_async_wait<2>",
     AssertionError),
    ("no barrier after the wait", "pipeline", "thread", "__syncthreads();  // everybody's", "// everybody's",
     Race),
    ("a stage filled while it is read", "pipeline", "thread", "__syncthreads();  // everybody has",
     "// everybody has", Race),
    ("too little dynamic memory", "pipeline", "address", "kBytes = 2 * kThreads * 16",
     "kBytes = 2 * kThreads * 16 - 4", BadAccess),
    ("more than may be asked for", "pipeline", "plain", "kBytes = 2 * kThreads * 16", "kBytes = 64 << 10",
     LaunchFailed),
    ("a copy off its alignment", "pipeline", "plain", "x + (chunk * kThreads + thread) * 4",
     "x + (chunk * kThreads + thread) * 4 + 1", LaunchFailed),
    ("a wide load off its alignment", "wide", "address", "x + row * row_stride",
     "x + row * (row_stride - 1)", BadAccess),
    ("a barrier some never reach", "leave", "plain", "  __syncthreads();\n  out",
     "  if (thread < 32) __syncthreads();\n  else __syncwarp(1u << 31 | 1);\n  out", LaunchFailed),
    ("a result read before its fence", "relay", "thread", "__threadfence();  // what", "// what", Race),
    ("a result told of before its fence", "relay", "thread", "__threadfence();  // for", "// for", Race),
    ("a block waits for one that cannot start", "relay", "plain", "!= number",
     "!= gridDim.x - 1 - number", LaunchFailed),
    ("a block waits for one that has not started", "relay", "plain", "atomicAdd(started, 1u)", "blockIdx.x",
     LaunchFailed),
    ("a block waits for what nobody does", "relay", "plain", "  atomicAdd(turn, 1u);", "", LaunchFailed),
    ("an empty grid", "histogram", "plain", "(n + kThreads - 1) / kThreads", "(n - n)", LaunchFailed),
]  # fmt: skip


def planted_toy(what, toy, kind, old, new, found) -> Fault:
    def check(target):
        for seed in range(4 if kind == "plain" else 1):
            CHECKS[toy](target, seed=seed)

    return Fault(what, cuda_on_cpu.TOYS[0], kind, old, new, found, check)


@pytest.mark.parametrize("fault", [planted_toy(*fault) for fault in FAULTS], ids=lambda fault: fault.what)
def test_a_fault_in_a_toy_is_found(planted, fault):
    fault.must_be_found(planted(fault))
