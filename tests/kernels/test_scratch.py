"""Counters that the CUDA library's kernels find at 0: which calls share them, and which must not."""

import importlib

import pytest
import torch
from peft_engine.kernels.prefix_attention import decode

import peft_engine.ops.lora_groups  # noqa: F401  (defines its raw ops)
from peft_engine import native
from peft_engine.kernels import scratch
from peft_engine.kernels.scratch import fresh, zeroed

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


class Library:
    """Says that the graph `capture` is being captured, 0 for none."""

    capture = 0

    def pe_cuda_capture(self, stream, device):
        return self.capture


@pytest.fixture
def library(monkeypatch):
    for name in ("_held", "_captured"):
        monkeypatch.setattr(scratch, name, {})
    found, zeros = Library(), torch.zeros
    monkeypatch.setattr(native, "cuda", lambda: found)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch, "zeros", lambda *size, device=None, **rest: zeros(*size, **rest))
    return found


def test_a_stream_reuses_its_counters_and_an_op_has_its_own(library):
    first = zeroed("down", 12, CPU, 0)
    assert first.numel() == 12 and not first.any()
    assert zeroed("down", 8, CPU, 0).data_ptr() == first.data_ptr()
    assert zeroed("outer", 12, CPU, 0).data_ptr() != first.data_ptr()
    grown = zeroed("down", 13, CPU, 0)
    assert grown.numel() == 13 and not grown.any()


def test_streams_and_graphs_do_not_share(library):
    eager = [zeroed("down", 8, GPU, stream) for stream in (1, 2)]
    library.capture = 7
    graph = [zeroed("down", 8, GPU, stream) for stream in (1, 2, 1)]
    assert graph[0] is graph[2] and len({t.data_ptr() for t in [*eager, *graph]}) == 4
    library.capture = 8
    later = zeroed("down", 8, GPU, 1)
    assert later.data_ptr() not in {t.data_ptr() for t in [*eager, *graph]}
    assert [key[1] for key in scratch._captured] == [8]


OPS = {
    "lora_linear_forward": "lora_linear.forward",
    "lora_groups_forward": "lora_groups.groups",
    "prefix_attention_forward": "prefix_attention.forward",
    "bottleneck_forward": "bottleneck.forward",
}


@pytest.mark.parametrize("op", OPS)
def test_an_op_that_torch_compile_calls_keeps_nothing(monkeypatch, op):
    """Those whose kernels ask for counters run inside fresh() when they are called through the dispatcher."""
    asked = []
    kernels = importlib.import_module(f"peft_engine.kernels.{OPS[op]}")
    answer = torch.empty(0), torch.empty(0), torch.empty(0)
    count = len(getattr(torch.ops.peft_engine, op).default._schema.returns)

    def forward(*arguments):
        asked.append(scratch._here.fresh)
        return answer[:count]

    monkeypatch.setattr(kernels, "forward", forward)
    monkeypatch.setattr(decode, "refuse", lambda *arguments: "not asked here")
    overload = getattr(torch.ops.peft_engine, op).default
    given = {"Tensor": torch.empty(1, 1), "int": 1, "float": 0.0, "bool": False, "str": "relu"}
    overload.redispatch(
        torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA),
        *(given.get(str(a.type)) for a in overload._schema.arguments),
    )
    assert asked == [True] and not getattr(scratch._here, "fresh", False)


def test_what_torch_compile_calls_keeps_nothing(library):
    with fresh():
        one, two = (zeroed("down", 8, GPU, 1) for _ in range(2))
    assert one is not two and not scratch._held and not scratch._captured
    assert zeroed("down", 8, GPU, 1) is zeroed("down", 8, GPU, 1)
