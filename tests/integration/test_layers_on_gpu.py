"""Whole models by the way they take on a GPU, whose kernels are interpreted here on CPU tensors."""

import copy
from functools import partial

import pytest
import torch
from accuracy import assert_twice_as_good
from peft_engine.kernels.lora_linear import workspace
from test_layers import check, family, fuse, make  # noqa: F401  (a fixture)

import peft_engine as pe
from peft_engine import dispatch
from peft_engine.activations import spare_width, with_spare
from peft_engine.ops.nf4 import reference_dequantize

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")


def test_output_and_gradients_are_within_twice_the_own_error(as_on_a_gpu, family):  # noqa: F811
    check(family, torch.float32, torch.randint(3, 61, (2, 9)))


def test_half_precision_is_within_twice_the_own_error(as_on_a_gpu):
    check("Llama", torch.bfloat16, torch.randint(3, 61, (2, 9)))


def test_packed_documents_are_within_twice_the_own_error(as_on_a_gpu):
    positions = torch.cat([torch.arange(n) for n in (3, 9, 1)])[None]
    for name in ("Llama", "Mistral"):
        check(name, torch.float32, torch.randint(3, 61, (1, 13)), position_ids=positions, use_cache=False)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_within_twice_the_own_error(as_on_a_gpu, side):
    ids, mask = torch.randint(3, 61, (2, 11)), torch.ones(2, 11, dtype=torch.long)
    mask[0, slice(0, 4) if side == "left" else slice(7, 11)] = 0
    check("Llama", torch.float32, ids, attention_mask=mask)


def test_attention_dropout_is_that_of_the_reference_behind_a_prefix_and_without(as_on_a_gpu):
    model = make(attention_dropout=0.3).train()
    fuse(model)
    batch = {
        "input_ids": torch.randint(3, 61, (2, 11)),
        "attention_mask": torch.ones(2, 11, dtype=torch.long),
    }
    batch["attention_mask"][0, 7:] = 0
    for prefix in (0, 3):
        if prefix:
            pe.attach(model, pe.PrefixTuningConfig(num_virtual_tokens=prefix))
        found = []
        for backend in ("triton", "reference"):
            torch.manual_seed(7)
            with pe.force_backend(backend):
                loss = model(**batch, labels=batch["input_ids"]).loss
                learn = [p for p in model.parameters() if p.requires_grad]
                found.append((loss.detach(), *torch.autograd.grad(loss, learn)))
        for got, want in zip(*found, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def adapted(dora):
    """A model over NF4 with LoRA or DoRA on every linear, whose B is not zero."""
    model = pe.quantize_(make(hidden_size=64, intermediate_size=128, num_hidden_layers=1))
    pe.attach(model, pe.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", use_dora=dora))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, 0.0, 0.1)
    return model


def dense(model, dtype):
    """The same in plain torch, over the weights that the 4 bits stand for."""
    twin = copy.deepcopy(model).to(dtype)
    for module in twin.modules():
        if isinstance(module, pe.nn.NF4Linear):
            weight = reference_dequantize(module.nf4, torch.float64).to(dtype)
            module.forward = partial(product, module, weight)
    return twin


def product(module, weight, x):
    """Plain torch's product of a layer with its adapter."""
    a, b = module.lora_A["default"], module.lora_B["default"]
    y = x @ weight.t() + 2.0 * (x @ a.t()) @ b.t()
    if not module.lora["default"].dora:
        return y
    norm = torch.linalg.vector_norm((weight + 2.0 * b @ a).detach(), dim=1)
    return y * (module.lora_magnitude_vector["default"] / norm)


def loss_and_gradients(model, ids, labels):
    loss = model(input_ids=ids, labels=labels).loss
    trained = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, trained)
    return loss.detach(), torch.cat([g.flatten() for g in grads])


@pytest.mark.parametrize("dora", [False, True])
def test_a_qlora_step_is_within_twice_the_error_of_plain_torch(as_on_a_gpu, dora):
    """Every kernel of a step together: NF4 with LoRA, norms, rotary, attention, SwiGLU, the joined loss."""
    model = adapted(dora)
    ids = torch.randint(3, 61, (2, 9))
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.3, -100)
    exact = loss_and_gradients(dense(model, torch.float64), ids, labels)
    plain = loss_and_gradients(dense(model, torch.float32), ids, labels)
    report = pe.optimize(model)
    fused = {line.op for line in report.layers if line.fused and line.backend == "triton"}
    assert fused >= {
        "dora_linear" if dora else "lora_linear",
        "rms_norm",
        "attention",
        "swiglu",
        "linear_cross_entropy",
    }, str(report)
    got = loss_and_gradients(model, ids, labels)
    for name, *results in zip(("loss", "gradients"), got, plain, exact, strict=True):
        assert_twice_as_good(*results, what=name)


@pytest.mark.parametrize("peft", [False, True])
def test_the_mlp_leaves_room_for_the_adapters_of_its_layers(as_on_a_gpu, monkeypatch, peft):
    """swiglu's result and gradients are what down_proj, gate_proj and up_proj are given: no copy."""
    model = make("Llama", torch.bfloat16, hidden_size=64, intermediate_size=128)
    settings = {"r": 5, "target_modules": ["gate_proj", "up_proj", "down_proj"], "lora_alpha": 8}
    if peft:
        library = pytest.importorskip("peft")
        config = library.LoraConfig(**settings)
        model = library.get_peft_model(model, config, autocast_adapter_dtype=True)
    else:
        pe.attach(model, pe.LoraConfig(**settings))
    pe.optimize(model)
    found = []

    def widened(x, a, *arguments):
        found.append((tuple(a.shape), with_spare(x, spare_width(5, a.dtype, x.dtype)) is not None))
        return before(x, a, *arguments)

    before = workspace.widened
    monkeypatch.setattr(workspace, "widened", widened)
    monkeypatch.setattr(workspace, "augments", lambda *arguments: True)  # of so few rows it would not
    model(torch.randint(3, 61, (2, 9))).logits.float().sum().backward()
    # down_proj's x in both layers; the gradients of gate and up in the second: the first's x learns nothing
    assert [shape for shape, room in found if room] == [(5, 128)] * 4
    assert len(found) == 10  # the norm's rows and the gradient of the residual have no room


METHODS = {
    "lora": pe.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False),
    "prefix": pe.PrefixTuningConfig(num_virtual_tokens=3),
    "prompt": pe.PromptTuningConfig(num_virtual_tokens=3),
    "bottleneck": pe.BottleneckConfig(mh_adapter=False, output_adapter=True, reduction_factor=8),
}


@pytest.mark.parametrize("method", METHODS)
def test_each_method_s_step_is_that_of_plain_torch(as_on_a_gpu, method):
    """The kernels' own accuracy is tested elsewhere: here, that a model calls them as they want to be."""
    model = make(hidden_size=64, num_hidden_layers=1)
    pe.attach(model, METHODS[method])
    pe.optimize(model)
    ids = torch.randint(3, 61, (2, 7))
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.3, -100)
    got = loss_and_gradients(model, ids, labels)
    with dispatch.force_backend("reference"):
        want = loss_and_gradients(model, ids, labels)
    assert got[1].norm() > 0
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("method", METHODS)
def test_each_method_generates_the_tokens_of_plain_torch(as_on_a_gpu, method):
    model = make(hidden_size=64, num_hidden_layers=1)
    pe.attach(model, METHODS[method])
    pe.optimize(model)
    ids, mask = torch.randint(3, 61, (2, 5)), torch.ones(2, 5, dtype=torch.long)
    mask[0, :2] = 0
    settings = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "attention_mask": mask}
    got = model.generate(ids, **settings)
    with dispatch.force_backend("reference"):
        assert torch.equal(got, model.generate(ids, **settings))


def test_a_mixed_batch_s_rows_are_those_of_each_adapter_alone(as_on_a_gpu):
    model = make(hidden_size=64, num_hidden_layers=1)
    for name, config in METHODS.items():
        pe.attach(model, config, name=name)
    pe.optimize(model)
    ids = torch.randint(3, 61, (1, 6)).expand(5, 6)
    names = [*METHODS, None]
    with torch.no_grad():
        with pe.active(model, names):
            together = model(ids).logits
        for i, name in enumerate(names):
            with pe.active(model, name):
                torch.testing.assert_close(together[i], model(ids[:1]).logits[0])
