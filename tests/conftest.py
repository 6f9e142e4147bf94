"""Fixtures for every test: no hub, two threads, a fixed seed; backends and instruction sets; a tiny Llama."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers and bitsandbytes are imported: they read it once
# Before torch is: threads without work sleep and leave the cores to the other process of tests (pytest -n 2).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before a kernel is defined: it is then run on CPU tensors

import dataclasses
import gc
from collections.abc import Callable, Iterator

import hypothesis
import pytest
import transformers

from peft_engine import dispatch, native

# The same examples in every run; HYPOTHESIS_PROFILE=explore draws new ones.
hypothesis.settings.register_profile("same", derandomize=True)
hypothesis.settings.register_profile("explore", max_examples=2000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

torch.set_num_threads(min(2, torch.get_num_threads()))

# `make test` gives each file to one of two processes, in this order: the longest first, that none is left at
# the end to keep one process busy alone.
LONGEST = (
    "test_compile.py", "test_cuda_faults.py", "test_cuda_bottleneck_faults.py", "test_cuda_on_cpu.py",
    "test_cuda_bottleneck.py", "test_cuda_prefix_attention.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: n for n, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


def pytest_collection_finish() -> None:
    """What is there before the first test stays: it is not searched for garbage again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once with each backend that CPU tensors can take, pinned."""
    why = dispatch.available_backends()[request.param]
    if why is not None:
        pytest.skip(f"backend {request.param}: {why}")
    with dispatch.force_backend(request.param):
        yield request.param


def _isas() -> list:
    why = native.load_error()
    if why is not None:
        return [pytest.param("none", marks=pytest.mark.skip(reason=why))]
    return list(native.supported_isas())


@pytest.fixture(params=_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once with each instruction set this machine has, the cpu backend pinned."""
    before = native.isa()
    native.set_isa(request.param)
    try:
        with dispatch.force_backend("cpu"):
            yield request.param
    finally:
        native.set_isa(before)


@pytest.fixture
def as_on_a_gpu(monkeypatch) -> Iterator[None]:
    """Ops run their Triton kernels on CPU tensors, in the mended interpreter, by the way a GPU's take."""
    if torch.cuda.is_available():
        pytest.skip("a GPU is here: the kernels run on it, not in the interpreter")
    pytest.importorskip("triton", reason="triton is not installed (the `gpu` extra)")
    from triton_interpreter import mended

    for op in dispatch.OPS.values():
        entries = [
            dataclasses.replace(entry, refuse=lambda call: None) if entry.name == "triton" else entry
            for entry in op._entries
            if entry.name != "cpu"
        ]
        monkeypatch.setattr(op, "_entries", entries)
        monkeypatch.setattr(op, "_cache", {})
    monkeypatch.setattr(dispatch, "GPU_BACKENDS", ())  # which are otherwise passed by for CPU tensors
    monkeypatch.setattr(dispatch, "_look_for_triton", lambda: None)
    monkeypatch.setattr(dispatch, "on_gpu", lambda x: True)
    with mended(shuffle=0):
        yield


@pytest.fixture
def bnb():
    """bitsandbytes, for tests marked `peers`."""
    return pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (the `peers` extra)")


@pytest.fixture
def tiny_llama() -> Callable[..., transformers.LlamaForCausalLM]:
    """A factory: two Llama layers with random weights, hidden 64; keywords go to LlamaConfig."""

    def make(dtype: torch.dtype = torch.float32, **changes) -> transformers.LlamaForCausalLM:
        settings = {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 101,
            "max_position_embeddings": 128,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        config = transformers.LlamaConfig(**(settings | changes))
        # Not .to(dtype): it rounds the rotary frequencies too, which from_pretrained keeps in float32.
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()

    return make
