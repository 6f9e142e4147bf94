"""The launcher: one compilation for what Triton specialises on, and the compiled kernel found again."""

import inspect

import pytest
import torch

from peft_engine.kernels import launch as launcher
from peft_engine.kernels import tiles
from peft_engine.kernels.launch import cdiv, launch


class OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU."""

    device = torch.device("cuda", 0)


def on_gpu(tensor: torch.Tensor) -> torch.Tensor:
    return torch.Tensor._make_subclass(OnGpu, tensor)


class Kernel:
    """Stands for a triton.jit function: notes what is compiled, and what runs of it afterwards."""

    __name__ = "kernel"

    def __init__(self):
        self.arg_names = ["x", "n", "scale", "BLOCK"]
        self.compiled: list[tuple] = []
        self.ran: list[tuple] = []

    def __getitem__(self, grid):
        def compile_(*arguments, **constants):
            number = len(self.compiled)
            self.compiled.append(arguments)
            return Compiled(self, number)

        return compile_


class Compiled:
    def __init__(self, kernel: Kernel, number: int):
        self.kernel, self.number = kernel, number

    def __getitem__(self, grid):
        return lambda *raw: self.kernel.ran.append((self.number, grid, raw))


@pytest.fixture
def kernel(monkeypatch) -> Kernel:
    monkeypatch.setattr(launcher, "_compiled", {})
    monkeypatch.setattr(launcher, "_seen", {})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return Kernel()


def run(kernel, x, n, scale=1.0, block=16):
    launch(kernel, (2,), (x, n, scale), {"BLOCK": block}, num_warps=4)


MEMORY = torch.empty(64)
X = on_gpu(MEMORY)


def test_what_was_launched_before_runs_compiled_with_addresses(kernel):
    for _ in range(3):
        run(kernel, X, 32)
    assert len(kernel.compiled) == 1
    assert kernel.ran == [(0, (2, 1, 1), (MEMORY.data_ptr(), 32, 1.0, 16))] * 2


def test_values_of_one_kind_share_a_compilation(kernel):
    for n in (32, 48, 64, 48):
        run(kernel, X, n, scale=float(n))
    assert len(kernel.compiled) == 1
    assert [raw[1:3] for _, _, raw in kernel.ran] == [(48, 48.0), (64, 64.0), (48, 48.0)]


@pytest.mark.parametrize(
    "other",
    [
        {"n": 1},
        {"n": 33},
        {"n": 2**31},
        {"x": on_gpu(MEMORY[1:])},
        {"x": on_gpu(MEMORY.double())},
        {"block": 32},
    ],
    ids=lambda other: str(next(iter(other))),
)
def test_what_triton_specialises_on_is_compiled_anew(kernel, other):
    for arguments in ({"x": X, "n": 32}, {"x": X, "n": 32} | other) * 3:
        run(kernel, **arguments)
    assert len(kernel.compiled) == 2
    assert [number for number, _, _ in kernel.ran] == [0, 1] * 2


def test_an_integer_is_not_taken_for_a_float(kernel):
    run(kernel, X, 32, scale=1.0)
    run(kernel, X, 32, scale=1)
    run(kernel, X, 32, scale=1)
    assert len(kernel.compiled) == 2 and [number for number, _, _ in kernel.ran] == [1]


def test_what_a_kernel_says_not_to_specialise_on_is_not_compiled_anew(kernel):
    kernel.do_not_specialize = ["n"]
    for n in (1, 32, 33, 2**31 - 1):
        run(kernel, X, n)
    assert len(kernel.compiled) == 1
    run(kernel, X, 2**31)  # but 64 bits are another type
    assert len(kernel.compiled) == 2


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(32, 8, 128), (9, 3, 64)])
def test_all_lengths_share_the_compiled_kernels_of_prefix_attention(heads, kv_heads, head_dim, monkeypatch):
    """By this launcher's key as by Triton's own."""
    from peft_engine.kernels.prefix_attention import dkv, dq, forward
    from peft_engine.kernels.prefix_attention.backward import backward
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    backend = make_backend(GPUTarget("cuda", 90, 32))
    ours, tritons = set(), set()

    def note(kernel, grid, arguments, constants, **options):
        jit = kernel if isinstance(kernel, JITFunction) else JITFunction(kernel.fn, **kernel.kwargs)
        ours.add((jit.__name__, launcher._specialised(jit, None, arguments, constants, options)[1:]))
        binder = create_function_from_signature(inspect.signature(jit.fn), jit.params, backend)
        _, specialised, _ = binder(*arguments, **constants)
        tritons.add((jit.__name__, tuple(specialised), *constants.values()))

    for module in (forward, dq, dkv):
        monkeypatch.setattr(module, "launch", note)
    prefix = torch.empty(1, kv_heads, 20, head_dim, device="meta")
    for batch, tokens in ((1, 65), (1, 128), (3, 1000), (4, 2048), (2, 257), (17, 512)):
        q, k = (
            torch.empty(batch, tokens, n, head_dim, dtype=torch.bfloat16, device="meta").transpose(1, 2)
            for n in (heads, kv_heads)
        )
        masks = None, None, None, True
        out, lse = forward.forward(q, k, k, prefix, prefix, *masks, 0.1)
        backward(q, q, k, k, prefix, prefix, out, lse, *masks, 0.1)
    names = {"forward_kernel", "dq_kernel", "dkv_kernel", "prefix_kernel", "sum_kernel"}
    assert sorted(name for name, *_ in tritons) == sorted(names)
    assert sorted(name for name, _ in ours) == sorted(names)


def test_no_grid_is_too_wide_for_cuda_however_many_rows_there_are(monkeypatch):
    """65535 is the most of the second and the third dimension."""
    from peft_engine.kernels.bottleneck import split
    from peft_engine.kernels.bottleneck.call import Call
    from peft_engine.kernels.lora_linear import adapter, down, outer, single, up

    grids = {}
    for module in (adapter, down, outer, single, up, split):
        monkeypatch.setattr(module, "launch", lambda kernel, grid, *_, **__: grids.update({kernel: grid}))

    def meta(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta")

    rows, width, rank = 2**24, 128, 8
    x, h, a, b = (
        meta(rows, width),
        meta(rows, rank, dtype=torch.float32),
        meta(rank, width),
        meta(width, rank),
    )
    base = meta(width * width // 2, dtype=torch.uint8), meta(2, dtype=torch.float32), None, None, 64
    single.forward(x, base, width, a, b, 1.0, None, 0.0, None)
    single.backward(x, base, width, a, b, 1.0, 0.0, None)
    up.up_(x, h, b, 1.0)
    outer.outer(h, x, h, x, torch.float32)
    call = Call(meta(rank, width), None, meta(width, rank), None, meta(width), None, "relu", 1.0, 1e-5)
    middle, stats = meta(rows, rank), meta(rows, 2, dtype=torch.float32)
    split.forward(call, x, x, x, middle, stats)
    split.backward(call, x, x, middle, stats, middle, x, residual_is_x=True)
    assert len(grids) >= 9
    for kernel, grid in grids.items():
        assert all(n <= 65535 for n in grid[1:]), (kernel, grid)


def test_two_kernels_are_two(kernel):
    other = Kernel()
    for each in (kernel, other, kernel, other):
        run(each, X, 32)
    assert (len(kernel.compiled), len(kernel.ran), len(other.compiled), len(other.ran)) == (1, 1, 1, 1)


def test_many_lengths_leave_a_bounded_memory(kernel, monkeypatch):
    monkeypatch.setattr(launcher, "_MOST_SEEN", 8)
    for n in range(16, 16 * 50, 16):
        run(kernel, X, n)
    assert len(kernel.compiled) == 1 and len(launcher._seen) <= 8
    assert [raw[1] for _, _, raw in kernel.ran] == list(range(32, 16 * 50, 16))


def test_constants_come_last_and_in_their_order(kernel):
    kernel.arg_names = ["x", "n", "BLOCK", "scale"]
    with pytest.raises(TypeError, match="ends with the constants"):
        run(kernel, X, 32)


@pytest.mark.parametrize(
    ("a", "b", "out"), [(0, 4, 0), (1, 4, 1), (4, 4, 1), (5, 4, 2), (2**40 + 1, 2, 2**39 + 1)]
)
def test_cdiv(a, b, out):
    assert cdiv(a, b) == out


def test_a_device_is_asked_once_for_its_capability(monkeypatch):
    asked = []

    def capability(device):
        asked.append(device)
        return (9, 0) if device == 7 else (8, 6)

    tiles._capability.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 8)
    for _ in range(3):
        assert tiles.architecture(torch.device("cuda", 7)) == 90
        assert tiles.architecture(torch.device("cuda")) == 86
    assert asked == [7, 8]
    tiles._capability.cache_clear()


def test_memory_that_was_freed_is_told_and_not_read(kernel):
    x = torch.zeros(3, 5)
    x.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"kernel: the memory of a tensor \(3, 5\) was freed"):
        run(kernel, on_gpu(x), 16)
    assert not kernel.compiled
    run(kernel, on_gpu(torch.zeros(0)), 16)  # an empty tensor has none
    assert len(kernel.compiled) == 1
