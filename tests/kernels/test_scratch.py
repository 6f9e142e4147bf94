"""Counters that kernels find at 0: which calls share them, and which must not."""

import pytest
import torch

from peft_engine import native
from peft_engine.kernels import scratch
from peft_engine.kernels.scratch import arrivals, zeroed


@pytest.fixture
def held(monkeypatch):
    for name in ("_held", "_captured"):
        monkeypatch.setattr(scratch, name, {})


@pytest.fixture
def capture(monkeypatch, held):
    """Call it with a graph's number: from then on, that graph is being captured."""
    monkeypatch.setattr(native, "cuda_error", lambda: None)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, device=None, **rest: zeros(*size, **rest))
    return lambda number: monkeypatch.setattr(scratch, "_capture", lambda device, stream: number)


GPU = torch.device("cuda", 0)


def test_a_stream_reuses_its_counters_and_an_op_has_its_own(held):
    x = torch.empty(1)
    first = arrivals("down", 3, x)
    assert first.dtype == torch.int32 and first.numel() >= 3 and not first.any()
    assert arrivals("down", 3, x).data_ptr() == first.data_ptr()
    assert arrivals("outer", 3, x).data_ptr() != first.data_ptr()
    grown = arrivals("down", first.numel() + 1, x)
    assert grown.numel() > first.numel() and not grown.any()


def test_streams_and_graphs_do_not_share(capture):
    capture(0)
    eager = {zeroed("down", 8, GPU, stream).data_ptr() for stream in (1, 2)}
    capture(7)
    graph = {zeroed("down", 8, GPU, stream).data_ptr() for stream in (1, 2, 1)}
    assert len(eager) == len(graph) == 2 and not eager & graph
    kept = [tensor for key, tensor in scratch._captured.items()]
    capture(8)
    later = zeroed("down", 8, GPU, 1).data_ptr()
    assert later not in eager | graph and len(kept) == 2
    assert [key[1] for key in scratch._captured] == [8]


def test_without_the_library_a_graph_fills_counters_for_each_call(capture):
    capture(scratch.UNKNOWN)
    one, two = (zeroed("down", 8, GPU, 1) for _ in range(2))
    assert one.data_ptr() != two.data_ptr() and not scratch._held and not scratch._captured
