"""How the CUDA library is called: on the tensors' own device, and never with memory that was freed."""

import contextlib
from collections.abc import Callable

import pytest
import torch
from peft_engine.kernels.bottleneck import few_rows as bottleneck
from peft_engine.kernels.bottleneck.call import Call
from peft_engine.kernels.lora_linear import few_rows as lora_linear
from peft_engine.kernels.nf4 import library as nf4
from peft_engine.kernels.prefix_attention import decode

from peft_engine import native
from peft_engine.kernels import scratch


class OnSecond(torch.Tensor):
    """A tensor that says it is on a machine's second GPU."""

    device = torch.device("cuda", 1)


def second(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.Tensor._make_subclass(OnSecond, torch.zeros(shape, dtype=dtype))


class Library:
    """Notes on which device each of its functions is called; all of them say 0, or 64 bytes of scratch."""

    def __init__(self):
        self.current, self.called, self.asked = 0, [], []

    def __getattr__(self, name: str) -> Callable[..., int]:
        def function(*arguments) -> int:
            if name.endswith("_workspace"):
                self.asked.append(arguments)
                return 64
            self.called.append((name, self.current))
            return 0

        return function

    @contextlib.contextmanager
    def device(self, index):
        before, self.current = self.current, index
        yield
        self.current = before


@pytest.fixture
def library(monkeypatch) -> Library:
    found = Library()
    monkeypatch.setattr(native, "cuda", lambda: found)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: found.current)
    monkeypatch.setattr(torch.cuda, "device", found.device)
    for name in ("_held", "_captured"):
        monkeypatch.setattr(scratch, name, {})
    for name in ("empty", "zeros"):
        made = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *size, made=made, device=None, **rest: made(*size, **rest))
    return found


def run_nf4(weight=None):
    weight = second(8 * 64 // 2, dtype=torch.uint8) if weight is None else weight
    nf4.by_library(weight, second(8), None, None, 64, second(8, 64))


def run_lora_linear(weight=None):
    weight = second(8 * 64 // 2, dtype=torch.uint8) if weight is None else weight
    base = weight, second(8), None, None, 64
    lora_linear.forward(second(2, 64), base, 8, second(4, 64), second(8, 4), 1.0, None, 0.0, None)


def run_bottleneck(weight=None):
    weight = second(4, 64) if weight is None else weight
    call = Call(weight, None, second(64, 4), None, None, None, "relu", 1.0, 0.0)
    x = second(2, 64)
    bottleneck.forward(call, x, x, second(2, 64), second(2, 4), second(0, 2))


def run_prefix_attention(weight=None):
    weight = second(1, 2, 3, 16) if weight is None else weight
    q, k = second(1, 2, 1, 16), second(1, 2, 5, 16)
    decode.forward(q, k, k, weight, weight, None, None, True, 1.0)


RUN = pytest.mark.parametrize("run", (run_nf4, run_lora_linear, run_bottleneck, run_prefix_attention))


@RUN
def test_it_is_called_while_the_tensors_device_is_the_current_one(library, run):
    run()
    assert library.called and {device for _, device in library.called} == {1}
    assert library.current == 0


@RUN
def test_memory_that_was_freed_is_told_and_not_read(library, run):
    freed = second(6, 7, 1, 2)
    freed.untyped_storage().resize_(0)
    with pytest.raises(
        RuntimeError, match=r"the memory of a tensor \(6, 7, 1, 2\) was freed. Under fully_shard"
    ):
        run(freed)
    assert not library.called


def test_the_size_of_scratch_is_asked_for_once(library):
    for _ in range(3):
        run_lora_linear()
    assert library.asked == [(2, 8, 64, 4, 1)]


def test_a_size_that_the_library_refuses_is_told_every_time(library, monkeypatch):
    monkeypatch.setattr(library, "pe_lora_linear_workspace", lambda *sizes: -1, raising=False)
    for _ in range(2):
        with pytest.raises(
            RuntimeError, match="lora_linear: the CUDA library refuses 2 rows, a 8 x 64 weight"
        ):
            run_lora_linear()
