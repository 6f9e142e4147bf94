"""Whole models by the way they take on a GPU, whose kernels are interpreted here on CPU tensors."""

import copy

import pytest
import torch
from accuracy import assert_twice_as_good
from test_layers import check, family, make  # noqa: F401  (a fixture)

import peft_engine as pe
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


def adapted():
    """A model over NF4 with LoRA on every linear, whose B is not zero."""
    model = pe.quantize_(make(hidden_size=64, intermediate_size=128, num_hidden_layers=1))
    pe.attach(model, pe.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
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
            a, b = module.lora_A["default"], module.lora_B["default"]
            module.forward = lambda x, w=weight, a=a, b=b: x @ w.t() + 2.0 * (x @ a.t()) @ b.t()
    return twin


def loss_and_gradients(model, ids, labels):
    loss = model(input_ids=ids, labels=labels).loss
    trained = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, trained)
    return loss.detach(), torch.cat([g.flatten() for g in grads])


def test_a_qlora_step_is_within_twice_the_error_of_plain_torch(as_on_a_gpu):
    """Every kernel of a step together: NF4 with LoRA, norms, rotary, attention, SwiGLU, the joined loss."""
    model = adapted()
    ids = torch.randint(3, 61, (2, 9))
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.3, -100)
    exact = loss_and_gradients(dense(model, torch.float64), ids, labels)
    plain = loss_and_gradients(dense(model, torch.float32), ids, labels)
    report = pe.optimize(model)
    fused = {line.op for line in report.layers if line.fused and line.backend == "triton"}
    assert fused >= {"lora_linear", "rms_norm", "attention", "swiglu", "linear_cross_entropy"}, str(report)
    got = loss_and_gradients(model, ids, labels)
    for name, *results in zip(("loss", "gradients"), got, plain, exact, strict=True):
        assert_twice_as_good(*results, what=name)
