"""Products with dense weights without an adapter, whoever of torch's two libraries and us does them."""

import pytest
import torch
from accuracy import assert_twice_as_good
from torch.nn import functional as F

import peft_engine as pe
from peft_engine import dense, dispatch, native

IDS = torch.arange(36).view(4, 9)


HALF = (torch.bfloat16, torch.float16)


@pytest.fixture(params=[True, False], ids=["oneDNN", "torch"])
def by_onednn(request, monkeypatch):
    """Both libraries, on any processor."""
    if request.param and not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(dense, "_BY_ONEDNN", request.param)
    return request.param


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


@pytest.mark.parametrize("shape", [(0,), (1,), (2,), (17,), (3, 5), (2, 0), ()], ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_product(by_onednn, shape, with_bias):
    x, weight = torch.randn(*shape, 33), torch.randn(19, 33)
    bias = torch.randn(19) if with_bias else None
    plain = F.linear(x, weight, bias)
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert_twice_as_good(dense.product(x, weight, bias), plain, exact)
    assert_twice_as_good(dense.product(x, weight.t().contiguous().t(), bias), plain, exact)
    if x.dim() > 1:
        assert_twice_as_good(dense.product(x.mT.contiguous().mT, weight, bias), plain, exact)


def test_of_many_rows_the_product_is_torchs_where_it_was_measured_faster(by_onednn, monkeypatch):
    x, weight = torch.randn(9, 24, requires_grad=True), torch.randn(40, 24)
    monkeypatch.setattr(dense, "ONEDNN_ROWS", {True: range(1, 9), False: range(1, 5)})
    monkeypatch.setattr(dense, "FEW_ROWS", range(0))
    for rows in (8, 9):
        y = dense.linear(x[:rows], weight)
        assert (type(y.grad_fn).__name__ == "_LinearBackward") is (by_onednn and rows == 8)
        assert torch.equal(dense.product(x[:rows].detach(), weight), y)
    assert torch.equal(y, F.linear(x, weight))
    turned = weight.t().contiguous().t()
    for rows in (4, 5):
        y = dense.linear(x[:rows], turned)
        assert (type(y.grad_fn).__name__ == "_LinearBackward") is (by_onednn and rows == 4)


def test_of_few_rows_the_product_of_float32_is_ours_where_it_was_measured_faster(by_onednn, monkeypatch):
    if native.load_error() is not None:
        pytest.skip(native.load_error())
    ran, ours = [], torch.ops.peft_engine.lora_linear_forward
    monkeypatch.setattr(torch.ops.peft_engine, "lora_linear_forward", lambda *a: ran.append(1) or ours(*a))
    monkeypatch.setattr(dense, "FEW_ROWS", range(2, 4))
    x, weight, bias = torch.randn(4, 24, requires_grad=True), torch.randn(40, 24), torch.randn(40)
    for rows in (1, 2, 3, 4):
        y = dense.linear(x[:rows], weight, bias)
        assert len(ran) == (by_onednn and rows in (2, 3)), rows
        exact = F.linear(x[:rows].double(), weight.double(), bias.double())
        assert_twice_as_good(y.detach(), F.linear(x[:rows], weight, bias).detach(), exact.detach())
        y.sum().backward()
        ran.clear()
    with dispatch.force_backend("reference"):
        dense.linear(x[:3], weight, bias)
    assert not ran


@pytest.mark.parametrize("dtype", (torch.float32, *HALF), ids=str)
@pytest.mark.parametrize("rows", [1, 4, 40])
def test_what_does_not_fit_is_torchs_to_refuse(by_onednn, by_us, dtype, rows):
    """No kernel reads beyond a weight or a bias, and a bias that torch spreads is spread."""
    weight, bias = torch.randn(8, 12).to(dtype), torch.randn(8).to(dtype)
    for lies in (weight, weight.t().contiguous().t()):
        for features in (1, 6, 13, 24):
            for x in (
                torch.randn(rows, features).to(dtype),
                torch.randn(rows, features).to(dtype).requires_grad_(),
            ):
                with pytest.raises(RuntimeError, match=r"shapes cannot be multiplied|size mismatch"):
                    dense.linear(x, lies, bias)
        x = torch.randn(rows, 12).to(dtype)
        with pytest.raises(RuntimeError):
            dense.linear(x, lies, bias[:3])
        with pytest.raises(RuntimeError):
            dense.linear(x, lies, bias.double())
        with pytest.raises(RuntimeError, match="meta"):
            dense.linear(x, lies, bias.to("meta"))
        assert torch.equal(dense.linear(x, lies, bias[:1]), F.linear(x, lies, bias[:1]))
    with pytest.raises(RuntimeError):
        dense.linear(torch.ones((), dtype=dtype), weight)


def test_other_layouts_and_proxies_are_torchs(by_onednn, by_us):
    x, weight = torch.randn(4, 12), torch.randn(8, 12)
    nested = torch.nested.nested_tensor([x, x[:2]])
    assert dense.linear(nested, weight).is_nested
    torch.testing.assert_close(dense.linear(x.to_sparse(), weight), F.linear(x, weight))
    layers = torch.nn.Sequential(torch.nn.Linear(12, 8)).requires_grad_(False)
    pe.optimize(layers)
    torch.testing.assert_close(torch.fx.symbolic_trace(layers)(x), layers(x))


def test_forward_mode_derivatives_are_torchs(by_onednn):
    x, weight = torch.randn(3, 24), torch.randn(40, 24)
    assert torch.func.jvp(lambda x: dense.linear(x, weight), (x,), (x,))[1].abs().max() > 0
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        assert torch.autograd.forward_ad.unpack_dual(dense.linear(dual, weight)).tangent is not None


def test_what_torch_transforms_is_torchs(by_onednn, by_us):
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = torch.randn(3, 24).to(dtype), torch.randn(40, 24).to(dtype)

        def total(x, weight=weight):
            return dense.linear(x, weight).square().sum()

        want = torch.func.grad(lambda x, w=weight: F.linear(x, w).square().sum())(x)
        assert torch.equal(torch.func.grad(total)(x), want)
        each = torch.func.vmap(torch.func.grad(total))(x)
        torch.testing.assert_close(each, want, rtol=0.05, atol=0.05)
        traced = torch.jit.trace(lambda x, w=weight: dense.linear(x, w), (x,))
        assert torch.equal(traced(x), F.linear(x, weight))
    wide, bias = weight.float(), torch.randn(40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.func.grad(lambda b: dense.linear(x, wide, b).float().sum())(bias).shape == (40,)
        assert torch.func.grad(lambda x: dense.linear(x, wide).float().sum())(x).shape == x.shape
        traced = torch.jit.trace(lambda x: dense.linear(x, wide), (x,))
        assert "peft_engine::" not in str(traced.graph)


@pytest.mark.parametrize("with_bias", [False, True])
def test_gradient_is_that_of_x_alone(by_onednn, with_bias):
    x, weight = torch.randn(2, 7, 24, requires_grad=True), torch.randn(40, 24)
    bias, dy = torch.randn(40) if with_bias else None, torch.randn(2, 7, 40)
    y = dense.linear(x, weight, bias)
    assert (type(y.grad_fn).__name__ == "_LinearBackward") is by_onednn
    y.backward(dy)
    assert_twice_as_good(x.grad, dy @ weight, dy.double() @ weight.double())
    with torch.no_grad():
        assert torch.equal(dense.linear(x, weight, bias), y)


@pytest.mark.parametrize("which", ["weight", "bias"])
def test_what_learns_is_torchs(by_onednn, which):
    x, weight, bias = torch.randn(6, 24), torch.randn(40, 24), torch.randn(40)
    {"weight": weight, "bias": bias}[which].requires_grad_()
    y = dense.linear(x, weight, bias)
    assert torch.equal(y, F.linear(x, weight, bias))
    y.sum().backward()
    assert (weight.grad is not None, bias.grad is not None) == (which == "weight", which == "bias")
    with torch.no_grad():  # nothing learns
        assert torch.equal(dense.linear(x, weight, bias), dense.product(x, weight, bias))


def test_other_dtypes_are_torchs(by_onednn, monkeypatch):
    monkeypatch.setattr(dense, "_SLOW", set())
    x, weight = torch.randn(6, 24), torch.randn(40, 24)
    for dtype in (*HALF, torch.float64):
        low = x.to(dtype), weight.to(dtype)
        assert torch.equal(dense.linear(*low), F.linear(*low))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(dense.linear(x, weight), F.linear(x, weight))
    with pytest.raises(RuntimeError, match="dtype"):
        dense.linear(x.double(), weight)
    with torch.backends.mkldnn.flags(enabled=False):
        assert dense.library(weight) == "torch"
    assert dense.library(weight) == ("oneDNN" if by_onednn else "torch")


def test_compiles(by_onednn):
    x, weight = torch.randn(6, 24, requires_grad=True), torch.randn(40, 24)
    y = torch.compile(dense.linear, fullgraph=True, backend="aot_eager")(x, weight)
    y.sum().backward()
    exact = (x.double() @ weight.double().t()).detach()
    assert_twice_as_good(y.detach(), F.linear(x, weight).detach(), exact)
    ones = torch.ones(6, 40)
    assert_twice_as_good(x.grad, ones @ weight, ones.double() @ weight.double())


def test_rows_without_an_adapter_are_the_fused_base(by_onednn, llama):
    model = llama()
    pe.optimize(model)
    base = model(IDS).logits
    lora = pe.LoraConfig(target_modules=["q_proj", "o_proj", "up_proj"], init_lora_weights=False)
    pe.attach(model, lora, "a")
    pe.attach(model, lora, "b")
    with pe.active(model, None):
        assert torch.equal(model(IDS).logits, base)
    with pe.active(model, ["a", None, "b", None]):
        mixed = model(IDS).logits
    assert torch.equal(mixed[1], base[1]) and torch.equal(mixed[3], base[3])
    assert not torch.equal(mixed[0], base[0])
    assert torch.equal(pe.detach(model)(IDS).logits, base)


def test_hooks_of_the_projections_run(by_onednn, llama):
    model, seen = llama(), []
    pe.optimize(model)
    layer = model.model.layers[1]
    layer.self_attn.o_proj.register_forward_hook(lambda *_: seen.append("o_proj"))
    layer.mlp.up_proj.register_forward_pre_hook(lambda *_: seen.append("up_proj"))
    model(IDS)
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, *_: seen.append("any") if module is layer.self_attn.q_proj else None
    )
    model(IDS)
    handle.remove()
    assert seen == ["o_proj", "up_proj", "any", "o_proj", "up_proj"]


def test_explain_says_whose_product_runs(by_onednn, llama):
    model = llama()
    report = pe.optimize(model)
    lines = {line.name: line.reason for line in report.layers}
    assert ("oneDNN" in lines["model.layers.0.mlp.down_proj"]) is by_onednn
    model.model.layers[0].mlp.down_proj.weight.requires_grad_()
    lines = {line.name: line.reason for line in pe.explain(model).layers}
    assert "oneDNN" not in lines["model.layers.0.mlp.down_proj"]
    pe.unoptimize(model)
    assert not any("oneDNN" in line.reason for line in pe.explain(model).layers)


def test_a_bias_may_lie_apart(by_onednn):
    x, weight = torch.randn(40, 96), torch.randn(48, 96)
    for bias in (torch.randn(48, 3)[:, 1], torch.randn(1).expand(48)):
        torch.testing.assert_close(dense.linear(x, weight, bias), F.linear(x, weight, bias))
