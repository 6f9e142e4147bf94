"""Dense linear layers outside other fused ones: whose product runs, and what becomes of them."""

import copy
import io
import pickle

import peft
import pytest
import torch
from families import FAMILIES, build, inputs
from torch import nn
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

import peft_engine as pe
from peft_engine import dense, native
from peft_engine.dense_conv1d import FusedConv1D, FusedLoraConv1D
from peft_engine.dense_layers import FusedLinear, FusedLoraLinear
from peft_engine.heads import FusedHeadLinear
from peft_engine.methods.lora import LoraLinear
from peft_engine.methods.lora_conv1d import LoraConv1D
from peft_engine.nn import NF4Linear

HALF = (torch.bfloat16, torch.float16)
CONFIGS = {
    "prefix": pe.PrefixTuningConfig(num_virtual_tokens=3),
    "bottleneck": pe.BottleneckConfig(),
    "lora": pe.LoraConfig(r=3, init_lora_weights=False),
}


@pytest.fixture
def by_us(monkeypatch):
    """As on a processor without products of half precision."""
    if native.load_error() is not None:
        pytest.skip(native.load_error())
    monkeypatch.setattr(dense, "_SLOW", set(HALF))


class TorchsProducts(TorchDispatchMode):
    """The shapes of what torch multiplies by a matrix in half precision."""

    def __init__(self):
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            second = arguments[-1]
            if second.dtype in HALF:
                self.shapes.append(tuple(second.shape))
        return function(*arguments, **keywords or {})


def kinds(model) -> list[type]:
    found = [type(m) for m in model.modules()]
    return [kind for kind in found if issubclass(kind, (nn.Linear, Conv1D))]


def loss(model, family):
    return model(**inputs(family)).loss


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_torch_multiplies_by_no_frozen_weight_of_half_precision(by_us, family, method, dtype):
    model = build(family, dtype=dtype)
    pe.attach(model, CONFIGS[method])
    products = TorchsProducts()
    with products:
        plain = loss(model.train(), family)
    assert products.shapes or (family, method) == ("gpt2", "lora")  # default targets are all but the head
    pe.optimize(model)
    mine = TorchsProducts()
    with mine:
        fused = loss(model, family)
        fused.backward()
    # What is trained is torch's: a classifier's head, and the adapters' own.
    trained = {tuple(p.shape) for p in model.parameters() if p.requires_grad and p.dim() == 2}
    trained |= {shape[::-1] for shape in trained}
    assert [shape for shape in mine.shapes if shape not in trained] == []
    torch.testing.assert_close(fused, plain, rtol=0.02, atol=0.02)
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert gradients and any(g is not None and g.isfinite().all() and g.any() for g in gradients)


@pytest.mark.parametrize("family", ["gpt2", "bert", "bart"])
def test_in_and_out(family):
    model = build(family)
    before, plain = kinds(model), [*model.state_dict()]
    logits = model(**inputs(family)).logits + 0
    pe.optimize(model)
    fused = kinds(model)
    assert set(fused) <= {FusedLinear, FusedConv1D, FusedHeadLinear} and len(fused) == len(before)
    assert [*model.state_dict()] == plain
    optimised = model(**inputs(family)).logits + 0
    torch.testing.assert_close(optimised, logits, rtol=1e-4, atol=1e-5)
    pe.optimize(model)
    assert kinds(model) == fused
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert kinds(copied) == fused
        assert torch.equal(copied(**inputs(family)).logits + 0, optimised)
    held = io.BytesIO()
    torch.save(model, held)
    assert kinds(torch.load(io.BytesIO(held.getvalue()), weights_only=False)) == fused
    pe.unoptimize(model)
    assert kinds(model) == before
    assert torch.equal(model(**inputs(family)).logits, logits)


@pytest.mark.parametrize("family", ["gpt2", "bart"])
def test_adapters_come_and_go_on_an_optimised_model(family):
    model = build(family).requires_grad_(False)
    before = kinds(model)
    pe.optimize(model)
    fused = kinds(model)
    optimised = model(**inputs(family)).logits + 0
    target = ["c_attn", "c_fc"] if family == "gpt2" else ["q_proj", "fc1"]
    pe.attach(model, pe.LoraConfig(r=3, target_modules=target, init_lora_weights=False))
    adapted = kinds(model)
    assert (FusedLoraConv1D if family == "gpt2" else FusedLoraLinear) in adapted
    assert not torch.equal(model(**inputs(family)).logits + 0, optimised)
    with pe.active(model, None):
        torch.testing.assert_close(model(**inputs(family)).logits + 0, optimised, rtol=1e-5, atol=1e-6)
    pe.unoptimize(model)
    assert (LoraConv1D if family == "gpt2" else LoraLinear) in kinds(model)
    assert not {FusedLinear, FusedConv1D, FusedLoraLinear, FusedLoraConv1D}.intersection(kinds(model))
    pe.optimize(model)
    assert kinds(model) == adapted
    pe.detach(model)
    assert kinds(model) == fused
    assert torch.equal(model(**inputs(family)).logits + 0, optimised)
    pe.unoptimize(model)
    assert kinds(model) == before
    assert all(p.is_contiguous() for p in model.parameters())


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_an_optimised_model_is_quantised(family):
    model, other = build(family), build(family)
    pe.optimize(other)
    for one in (model, other):
        pe.quantize_(one)
        pe.optimize(one)
    assert kinds(other) == kinds(model)
    assert torch.equal(other(**inputs(family)).logits + 0, model(**inputs(family)).logits + 0)


def test_a_fused_linear_is_put_in_nf4_as_a_linear_is():
    model = nn.Sequential(nn.Linear(64, 8))
    pe.optimize(model)
    assert type(model[0]) is FusedLinear
    assert type(NF4Linear.from_linear(model[0])) is NF4Linear


def test_weights_of_a_conv1d_stay_as_they_lie_where_torchs_product_is_slow(by_us):
    """fully_shard and safetensors take no parameters that are not contiguous."""
    model = build("gpt2", dtype=torch.bfloat16)
    c_fc = model.transformer.h[0].mlp.c_fc
    at = c_fc.weight.data_ptr()
    pe.optimize(model)
    lines = {line.name: line for line in pe.explain(model.requires_grad_(False)).layers}
    line = lines["transformer.h.0.mlp.c_fc"]
    assert (line.backend, line.fused, line.kind) == ("cpu", True, "transformers.Conv1D")
    optimised = model(**inputs("gpt2")).logits + 0
    assert c_fc.weight.is_contiguous() and c_fc.weight.data_ptr() == at
    pe.attach(model, pe.LoraConfig(r=3))
    pe.detach(model)
    assert c_fc.weight.is_contiguous()
    assert torch.equal(model(**inputs("gpt2")).logits + 0, optimised)


def test_on_the_meta_device_torchs_runs():
    for family in ("gpt2", "llama"):
        model = build(family)
        pe.optimize(model)
        rows = torch.empty(2, 5, model.config.hidden_size, device="meta")
        assert model.to("meta")(inputs_embeds=rows).logits.shape == (2, 5, model.config.vocab_size)
        with torch.device("meta"):
            made = type(model)(copy.deepcopy(model.config))
        pe.optimize(made)
        assert made(inputs_embeds=rows).logits.is_meta


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_what_is_trained_whole_has_torchs_bits(family):
    model, other = build(family), build(family)
    pe.optimize(other)
    pe.unoptimize(other)
    for module in other.modules():  # those layers alone
        if type(module) in (nn.Linear, Conv1D):
            module.__class__ = FusedLinear if type(module) is nn.Linear else FusedConv1D
    for one in (model, other):
        loss(one, family).backward()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert (p.grad is None and q.grad is None) or torch.equal(p.grad, q.grad)


def test_a_head_whose_loss_is_not_fused():
    llama = build("llama")
    own, llama.loss_function = llama.loss_function, lambda logits, labels, **_: logits.sum()
    report = pe.optimize(llama)
    assert type(llama.lm_head) is FusedLinear
    (line,) = [line for line in report.layers if line.name == "lm_head"]
    assert not line.fused and line.kind == "torch.Linear"
    llama.loss_function = own
    pe.optimize(llama)
    assert type(llama.lm_head) is FusedHeadLinear
    pe.unoptimize(llama)
    assert type(llama.lm_head) is nn.Linear


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_pefts_layers_go_around_fused_ones(family):
    model = build(family)
    pe.optimize(model)
    optimised = model(**inputs(family)).logits + 0
    target = ["q_proj", "up_proj"] if family == "llama" else ["c_attn", "c_fc"]
    config = peft.LoraConfig(
        r=3, target_modules=target, init_lora_weights=False, fan_in_fan_out=family == "gpt2"
    )
    theirs = peft.get_peft_model(model, config)
    torch.manual_seed(0)
    logits = theirs(**inputs(family)).logits + 0
    lines = [line for line in pe.explain(theirs).layers if line.op == "lora_linear"]
    assert lines and all("optimize(model) fuses it" in line.reason for line in lines)
    report = pe.optimize(theirs)
    fused = [line for line in report.layers if line.op == "lora_linear"]
    assert len(fused) == len(lines) and all(line.fused for line in fused)
    torch.testing.assert_close(theirs(**inputs(family)).logits + 0, logits, rtol=1e-3, atol=1e-4)
    with theirs.disable_adapter():
        torch.testing.assert_close(theirs(**inputs(family)).logits + 0, optimised, rtol=1e-4, atol=1e-5)
    pe.unoptimize(theirs)
    assert not any(kind.__module__.startswith("peft_engine.dense") for kind in kinds(theirs))


def test_explain_before_and_after(by_us):
    model = build("bert", dtype=torch.float16).requires_grad_(False)
    name = "bert.encoder.layer.0.intermediate.dense"

    def line():
        return next(line for line in pe.explain(model).layers if line.name == name)

    assert not line().fused and line().reason.endswith("float32 has; peft_engine.optimize(model) has")
    pe.optimize(model)
    assert (line().backend, line().fused, line().reason) == ("cpu", True, "")
    model.get_submodule(name).weight.requires_grad_()
    assert line().fused
    with pe.force_backend("reference"):
        assert line().backend == "torch"
    model.bert.encoder.layer[0].intermediate.dense = nn.Linear(32, 48, dtype=torch.float16)
    assert not line().fused


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_compiled(by_us, dtype):
    model = nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 8)).to(dtype).requires_grad_(False)
    x = torch.randn(6, 24).to(dtype).requires_grad_()
    pe.optimize(model)
    plain = model(x)
    y = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(y, plain)
    products = TorchsProducts()
    with products:
        y.sum().backward()
    assert not products.shapes and x.grad.any()


def test_layers_elsewhere_and_of_other_classes_stay():
    class Own(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(4, 4, device="meta"), Own(4, 4), nn.Bilinear(4, 4, 4))
    pe.optimize(model)
    assert [type(m) for m in model] == [nn.Linear, Own, nn.Bilinear]
    normed = torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    kind = type(normed)
    pe.optimize(nn.Sequential(normed))
    assert type(normed) is kind
    pruned = prune.random_unstructured(nn.Linear(4, 4), "weight", 0.5)
    x = torch.randn(3, 4)
    y = pruned(x)
    pe.optimize(nn.Sequential(pruned))
    assert torch.equal(pruned(x), y)
