"""torch's FlopCounterMode counts of a model with fused layers what it counts of the same in plain torch."""

import copy

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

import peft_engine as pe
from peft_engine import native

pytestmark = pytest.mark.skipif(native.load_error() is not None, reason=str(native.load_error()))
IDS = torch.arange(3, 35).view(4, 8)


def counted(model):
    for p in model.parameters():
        p.grad = None
    with FlopCounterMode(display=False) as counter:
        # not the head: the counter's hooks look at the logits, which are formed for it
        model.model(input_ids=IDS).last_hidden_state.square().sum().backward()
    return counter.get_total_flops()


LORA = pe.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
CONFIGS = {
    "lora": LORA,
    "bottleneck": pe.BottleneckConfig.pfeiffer(width=8),
    "prefix": pe.PrefixTuningConfig(num_virtual_tokens=3),
}


def in_plain_torch(model):
    """The same, not optimised, with attention as matrix multiplications."""
    plain = copy.deepcopy(model)
    plain.set_attn_implementation("eager")
    return plain


@pytest.mark.parametrize("nf4", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("how", CONFIGS)
def test_a_step_has_the_products_of_the_reference(how, nf4, tiny_llama):
    model = tiny_llama(num_key_value_heads=2)
    model = pe.attach(pe.quantize_(model) if nf4 else model, CONFIGS[how])
    plain = in_plain_torch(model)
    pe.optimize(model)
    with pe.force_backend("reference"):
        want = counted(plain)
    # The kernel forms the gradients of the first layer's keys and values, which nobody asks for, too.
    assert counted(model) == want + (how == "prefix") * 45056


def test_experts_have_the_products_of_the_reference():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "vocab_size": 61}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **more))
    pe.attach(model, pe.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    plain = in_plain_torch(model)
    pe.optimize(model)
    with pe.force_backend("reference"):
        want = counted(plain)
    assert counted(model) == want


def test_the_loss_has_the_products_of_a_head():
    x, weight = torch.randn(6, 8, requires_grad=True), torch.randn(19, 8)
    for learns in (False, True):
        weight.requires_grad_(learns)
        with FlopCounterMode(display=False) as counter:
            pe.ops.linear_cross_entropy(x, weight, torch.arange(6)).backward()
        assert counter.get_total_flops() == 2 * 6 * 8 * 19 * (2 + learns)


def test_decoding_is_counted(tiny_llama):
    model = pe.attach(tiny_llama(), LORA)
    pe.optimize(model)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=IDS[:1, :1])
    held = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    assert counter.get_total_flops() >= 2 * sum(p.numel() for p in held)
