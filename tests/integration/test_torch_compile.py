"""torch.compile: a QLoRA Llama block trains in one graph at any length, and every raw op passes opcheck."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import peft_engine as pe
from peft_engine import dispatch, native
from peft_engine.ops.lora_groups import sort_rows
from peft_engine.ops.lora_linear import LORA_LINEAR, LoraLinearCall
from peft_engine.ops.nf4 import nf4_quantize

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    return request.param


def block_of(tiny_llama, device, dora=False):
    """A function of hidden states through one QLoRA (or QDoRA) Llama block, and what it trains."""
    model = tiny_llama(torch.bfloat16, max_position_embeddings=2048, hidden_size=128).to(device)
    pe.quantize_(model)
    settings = dict(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False, use_dora=dora)
    pe.attach(model, pe.LoraConfig(**settings))
    pe.optimize(model)
    layer, rotary = model.model.layers[0].train(), model.model.rotary_emb

    def block(hidden: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        out = layer(hidden, position_embeddings=rotary(hidden, positions), attention_mask=None)
        return out[0] if isinstance(out, tuple) else out

    return block, [p for p in layer.parameters() if p.requires_grad]


def step(block, parameters, hidden):
    """The output, and the gradients of the input and of the adapters."""
    hidden = hidden.clone().requires_grad_()
    out = block(hidden)
    gradients = torch.autograd.grad(out.float().square().mean(), [hidden, *parameters])
    return [out.detach(), *gradients]


@pytest.mark.parametrize("dora", (False, True), ids=("lora", "dora"))
def test_a_qlora_block_trains_in_one_graph_with_two_compilations_over_all_lengths(tiny_llama, device, dora):
    torch._dynamo.reset()
    block, parameters = block_of(tiny_llama, device, dora)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, fullgraph=True, backend=counter)
    for length in (64, 128, 65, 200, 333, 512, 1000, 2048):
        hidden = torch.randn(1, length, 128, dtype=torch.bfloat16, device=device)
        for got, want in zip(
            step(compiled, parameters, hidden), step(block, parameters, hidden), strict=True
        ):
            torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2 * want.abs().max().item())
    assert counter.frame_count <= 2


def arguments_of_lora_linear(device, nf4, rank, p):
    generator = torch.Generator().manual_seed(rank)

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(device)

    weight = randn(32, 64)
    if nf4:
        q = nf4_quantize(weight, double_quant=True)
        base = q.packed, q.absmax, q.nested_absmax, q.offset, q.blocksize
    else:
        base = weight, None, None, None, 0
    a, b = (randn(rank, 64), randn(32, rank)) if rank else (None, None)
    seed = torch.tensor([7], device=device) if p else None
    return randn(2, 5, 64), base, a, b, seed


@pytest.mark.parametrize("nf4", (True, False), ids=("nf4", "dense"))
@pytest.mark.parametrize("rank,p", ((4, 0.0), (4, 0.5), (0, 0.0)))
def test_opcheck_of_lora_linear(device, nf4, rank, p):
    skip_without_kernels(device)
    x, base, a, b, seed = arguments_of_lora_linear(device, nf4, rank, p)
    ops = torch.ops.peft_engine
    forward = x, *base, 32, a, b, 0.5, None, p, seed
    torch.library.opcheck(ops.lora_linear_forward.default, forward)
    _, h = ops.lora_linear_forward(*forward)
    dy = torch.randn(2, 5, 32, device=device)
    for need_dx in (True, False):
        backward = dy, x, *base, a, b, h if rank else None, 0.5, p, seed, need_dx, bool(rank)
        torch.library.opcheck(ops.lora_linear_backward.default, backward)


def test_opcheck_of_dora_linear(device):
    skip_without_kernels(device)
    y, dy = (torch.randn(2, 3, 40, dtype=torch.bfloat16, device=device) for _ in range(2))
    magnitude, norm, bias = (torch.rand(40, device=device) + 0.5 for _ in range(3))
    torch.library.opcheck(torch.ops.peft_engine.dora_linear_forward, (y, magnitude, norm, bias))
    torch.library.opcheck(torch.ops.peft_engine.dora_linear_forward, (y, magnitude, norm, None))
    for need in (True, False):
        torch.library.opcheck(torch.ops.peft_engine.dora_linear_backward, (dy, y, magnitude, norm, need))


@pytest.mark.parametrize("double", (True, False))
def test_opcheck_of_nf4(device, double):
    skip_without_kernels(device)
    weight = torch.randn(5, 77, device=device)
    ops = torch.ops.peft_engine
    torch.library.opcheck(ops.nf4_quantize.default, (weight.reshape(-1), 64))
    q = nf4_quantize(weight, double_quant=double)
    out = torch.empty(5, 77, device=device)
    arguments = q.packed, q.absmax, q.nested_absmax, q.offset, q.blocksize, out
    torch.library.opcheck(ops.nf4_dequantize.default, arguments)


@pytest.mark.gpu
def test_opcheck_of_lora_groups():
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU: sorted rows have kernels in Triton alone")
    x, base, *_ = arguments_of_lora_linear("cuda", True, 0, 0.0)
    a, b = torch.randn(3, 4, 64, device="cuda"), torch.randn(3, 32, 4, device="cuda")
    rows = sort_rows((2, -1), 5, 3, torch.device("cuda"))
    ops = torch.ops.peft_engine
    forward = x, *base, 32, a, b, *rows, None
    torch.library.opcheck(ops.lora_groups_forward.default, forward)
    _, h = ops.lora_groups_forward(*forward)
    dy = torch.randn(2, 5, 32, device="cuda")
    torch.library.opcheck(ops.lora_groups_backward.default, (dy, x, *base, a, b, h, *rows, True))


def skip_without_kernels(device):
    why = dispatch.available_backends()["triton" if device == "cuda" else "cpu"]
    if why is not None:
        pytest.skip(why)


def test_the_choice_for_a_gpu_is_made_while_tracing_without_a_break(monkeypatch):
    """What lora_linear asks before its raw op, with tensors on a GPU; the op's own choices are not traced."""
    monkeypatch.setattr(dispatch, "_look_for_triton", lambda: None)
    monkeypatch.setattr(native, "_cuda_error", lambda index: None)
    torch._dynamo.reset()

    def f(x):
        call = LoraLinearCall("cuda", torch.bfloat16, "nf4", torch.float32, 128, 16)
        name = LORA_LINEAR.choose(call).backend
        return x + (1 if name == "cuda" else 0)

    LORA_LINEAR._cache.clear()
    try:
        assert torch.compile(f, fullgraph=True, backend="eager")(torch.zeros(2)).tolist() == [1, 1]
    finally:
        LORA_LINEAR._cache.clear()
