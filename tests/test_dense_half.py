"""Products of half precision with dense weights where torch has none for the processor: ours are taken."""

import pytest
import torch
from accuracy import assert_twice_as_good
from torch.nn import functional as F

import peft_engine as pe
from peft_engine import dense, dispatch, layer_lines, native

IDS = torch.arange(36).view(4, 9)
HALF = (torch.bfloat16, torch.float16)


@pytest.fixture
def by_us(monkeypatch):
    """As on a processor without products of half precision."""
    if native.load_error() is not None:
        pytest.skip(native.load_error())
    monkeypatch.setattr(dense, "_SLOW", set(HALF))


@pytest.fixture
def llama(tiny_llama):
    """A frozen Llama with grouped heads, always the same."""

    def make(dtype: torch.dtype = torch.float32):
        torch.manual_seed(0)
        return tiny_llama(dtype, num_key_value_heads=2).requires_grad_(False)

    return make


@pytest.mark.parametrize("shape", [(0, 8), (8, 0)], ids=str)
def test_a_weight_without_rows_or_columns(by_us, shape):
    weight = torch.randn(shape, dtype=torch.float16)
    x, dy = (torch.randn(5, n, dtype=torch.float16) for n in reversed(shape))
    assert torch.equal(dense.product(x, weight), x @ weight.t())
    assert torch.equal(dense.product_back(dy, weight), dy @ weight)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 16, 70])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_weight_that_lies_by_its_columns_is_ours_too(by_us, dtype, rows, with_bias):
    """As a Conv1D's."""
    weight = (torch.randn(33, 40) / 6).to(dtype).t()
    bias = torch.randn(40).to(dtype) if with_bias else None
    x, dy = torch.randn(rows, 33).to(dtype), torch.randn(rows, 40).to(dtype)
    assert dense.library(weight) == "peft-engine"
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert_twice_as_good(dense.product(x, weight, bias), F.linear(x, weight, bias), exact)
    assert_twice_as_good(dense.product_back(dy, weight), dy @ weight, dy.double() @ weight.double())


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("shape", [(1,), (3, 5), (40,), ()], ids=str)
@pytest.mark.parametrize("learns", ["weight", "bias", "both", "all"])
def test_what_learns_in_half_precision_without_a_product_in_torch_is_ours(by_us, dtype, shape, learns):
    x, dy = torch.randn(*shape, 33).to(dtype), torch.randn(*shape, 40).to(dtype)
    weight, bias = torch.randn(40, 33).to(dtype), torch.randn(40).to(dtype)
    for lies in (weight, weight.t().contiguous().t()):
        results = []
        for how, wide in ((dense.linear, False), (F.linear, False), (F.linear, True)):
            x_, w, b = (
                t.double() if wide else t.clone(memory_format=torch.preserve_format) for t in (x, lies, bias)
            )
            (
                w.requires_grad_(learns != "bias"),
                b.requires_grad_(learns != "weight"),
                x_.requires_grad_(learns == "all"),
            )
            y = how(x_, w, b)
            torchs = matrix_products(lambda y=y: y.backward(dy.to(y.dtype), retain_graph=True))
            assert bool(torchs) is (wide or how is F.linear) or learns == "bias"
            for t in (x_, w, b):
                t.grad = None
            y.backward(dy.to(y.dtype))
            results.append([y.detach(), *(t.grad for t in (x_, w, b) if t.grad is not None)])
        assert len(results[0]) == 2 + (learns == "both") + 2 * (learns == "all")
        for ours, plain, exact in zip(*results, strict=True):
            assert_twice_as_good(ours, plain, exact)
        with torch.no_grad():
            assert_twice_as_good(dense.linear(x, lies.requires_grad_(), bias), results[1][0], results[2][0])
        lies.requires_grad_(False)


def matrix_products(run):
    """What `run` has torch multiply."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    names = {event.name for event in profile.events()}
    return names & {"aten::mm", "aten::addmm", "aten::bmm", "aten::matmul", "aten::linear"}


def test_what_learns_under_autocast_to_such_a_dtype_is_ours(by_us):
    x, weight, bias = torch.randn(7, 33), torch.randn(40, 33), torch.randn(40)
    found = []
    for how in (dense.linear, F.linear):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = how(*leaves)
            again = torch.ones_like(y)
            mine = matrix_products(lambda how=how, leaves=leaves, dy=again: how(*leaves).backward(dy))
        assert bool(mine) is (how is F.linear)
        for t in leaves:
            t.grad = None
        assert y.dtype == torch.bfloat16
        y.float().square().sum().backward()
        assert all(t.grad.dtype == torch.float32 for t in leaves)
        found.append([y.detach().float(), *(t.grad for t in leaves)])
    for got, want in zip(*found, strict=True):
        assert (got - want).norm() < 0.01 * want.norm()


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("stored", HALF, ids=str)
@pytest.mark.parametrize("lies", ["rows", "columns"])
def test_weights_that_nobody_froze_run_under_autocast_where_nothing_is_recorded(by_us, stored, learns, lies):
    """As generate does with a model just loaded."""
    x, weight, bias = torch.randn(3, 12), torch.randn(8, 12).to(stored), torch.randn(8).to(stored)
    weight = (weight if lies == "rows" else weight.t().contiguous().t()).requires_grad_(learns)
    with torch.no_grad(), torch.autocast("cpu", dtype=stored):
        y = dense.linear(x, weight, bias.requires_grad_(learns))
        exact = F.linear(x.double(), weight.double(), bias.double())
        assert_twice_as_good(y, F.linear(x, weight, bias), exact)
        torch._dynamo.reset()
        compiled = torch.compile(dense.linear, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x, weight, bias), y)
        torch._dynamo.reset()
        assert not matrix_products(lambda: dense.linear(x, weight, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_what_does_not_fit_is_torchs_to_refuse_under_autocast_too(by_us, dtype):
    x, weight = torch.randn(5, 12).to(dtype), torch.randn(8, 12).to(dtype)
    with torch.autocast("cpu", dtype=torch.float16):
        spread = torch.randn(1).to(dtype)
        torch.testing.assert_close(dense.linear(x, weight, spread), F.linear(x, weight, spread))
        for wrong in (torch.randn(8).double(), torch.randn(3).to(dtype)):
            with pytest.raises(RuntimeError) as torchs:
                F.linear(x, weight, wrong)
            with pytest.raises(RuntimeError) as ours:
                dense.linear(x, weight, wrong)
            assert str(ours.value) == str(torchs.value)
        with pytest.raises(RuntimeError, match=r"shapes cannot be multiplied"):
            dense.linear(x[:, :5], weight)


def test_autocast_keeps_no_copy_of_a_weight_that_lies_by_columns(by_us):
    x, weight = torch.randn(4, 33, requires_grad=True), torch.randn(33, 40).half().t()
    kept = []
    keep = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with keep, torch.autocast("cpu", dtype=torch.float16):
        dense.linear(x, weight)
    (only,) = [t for t in kept if t.shape == weight.shape]
    assert only.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_gradients_in_a_batch(by_us, dtype):
    x, weight = torch.randn(5, 12).to(dtype), torch.randn(8, 12).to(dtype).requires_grad_()
    each = torch.eye(40).view(40, 5, 8).to(dtype)
    found = [
        torch.autograd.grad(how(x, weight), weight, each, is_grads_batched=True)[0]
        for how in (dense.linear, F.linear)
    ]
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("how", ["loss", "logits"])
def test_the_gradient_of_a_head_that_learns_is_ours(by_us, tiny_llama, how):
    model = tiny_llama(torch.float16, tie_word_embeddings=True)
    pe.optimize(model)

    def step():
        out = model(input_ids=IDS, labels=IDS if how == "loss" else None)
        (out.loss if how == "loss" else out.logits.float().logsumexp(-1).sum()).backward()

    assert not matrix_products(step)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("stored", [torch.float32, *HALF], ids=str)
def test_under_autocast_to_half_precision_without_a_product_in_torch(by_us, dtype, stored, monkeypatch):
    x = torch.randn(2, 5, 24).to(stored).requires_grad_()
    weight, bias, dy = torch.randn(40, 24).to(stored), torch.randn(40).to(stored), torch.randn(2, 5, 40)
    with torch.autocast("cpu", dtype=dtype):
        plain = F.linear(x, weight, bias)
        (dx_plain,) = torch.autograd.grad(plain, x, dy.to(plain.dtype))
        torchs = F.linear
        monkeypatch.setattr(F, "linear", lambda *args: pytest.fail("torch's ran"))
        y = dense.linear(x, weight, bias)
    assert y.dtype == dtype and plain.dtype == dtype
    (dx,) = torch.autograd.grad(y, x, dy.to(dtype))
    assert dx.dtype == stored
    wide = x.detach().to(dtype).double(), weight.to(dtype).double()
    assert_twice_as_good(y.detach(), plain.detach(), torchs(*wide, bias.double()))
    assert_twice_as_good(dx, dx_plain, dy.to(dtype).double() @ wide[1])


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 5, 40])
def test_half_precision_without_a_product_in_torch_is_ours(by_us, dtype, rows):
    x = torch.randn(2, rows, 72).to(dtype).requires_grad_()
    weight, bias, dy = (torch.randn(shape).to(dtype) for shape in ((50, 72), (50,), (2, rows, 50)))
    assert dense.library(weight) == "peft-engine"
    assert dense.library(weight[:, ::2]) == "torch" and dense.library(weight.float()) != "peft-engine"
    y = dense.linear(x, weight, bias)
    y.backward(dy)
    grad, x = x.grad, x.detach()
    wide = x.double(), weight.double(), bias.double(), dy.double()
    assert_twice_as_good(y.detach(), F.linear(x, weight, bias), F.linear(*wide[:3]))
    assert_twice_as_good(grad, dy @ weight, wide[3] @ wide[1])
    with dispatch.force_backend("reference"):
        assert dense.library(weight) == "torch"


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_model_of_half_precision_without_a_product_in_torch(by_us, llama, dtype, monkeypatch):
    model = llama(dtype)
    plain, exact = model(IDS).logits, model.double()(IDS).logits
    model = llama(dtype)
    report = pe.optimize(model)
    lines = {line.name: line for line in report.layers}
    projection = lines["model.layers.1.self_attn.v_proj"]
    assert projection.fused and projection.backend == "cpu" and not projection.reason
    pe.attach(model, pe.PrefixTuningConfig(num_virtual_tokens=3))
    calls = []
    matmul, linear = torch.Tensor.__matmul__, F.linear
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "__matmul__", lambda a, b: calls.append(a.shape) or matmul(a, b))
        patch.setattr(F, "linear", lambda *args: calls.append(args[0].shape) or linear(*args))
        model.train()(IDS, labels=IDS).loss.backward()
    assert not calls  # torch multiplied nothing
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    pe.detach(model)
    assert_twice_as_good(model.eval()(IDS).logits, plain, exact)


def test_explain_tells_of_slow_products(by_us):
    linear = torch.nn.Sequential(torch.nn.Linear(8, 8, dtype=torch.bfloat16))
    (line,) = pe.explain(linear).layers
    assert not line.fused and "no fast product of torch.bfloat16" in line.reason


def test_products_that_are_slow_here_are_counted(by_us, tiny_llama):
    model = pe.attach(tiny_llama(torch.bfloat16), pe.LoraConfig(r=4, target_modules=["q_proj"]))
    told = layer_lines.slow(pe.explain(model))
    assert told.startswith("12 layers are multiplied by torch, which has no fast product of bfloat16")
    assert layer_lines.slow(pe.explain(tiny_llama())) == ""
    assert layer_lines.slow(pe.optimize(model)) == ""  # by ours: the projections inside fused layers
