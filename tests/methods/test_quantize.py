"""quantize_: what becomes NF4, what stays dense, and what is refused."""

import math

import families
import pytest
import torch
import transformers
from quantized_cases import IDS, assert_same_model, linear_names, nf4_names

import peft_engine as pe
from peft_engine.nn import NF4Linear
from peft_engine.ops.nf4 import BLOCKSIZES, nf4_quantize
from peft_engine.quantize import quantize_


@pytest.fixture(autouse=True)
def _quiet():
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_every_linear_but_the_head_holds_the_ops_bytes(backend, tiny_llama, blocksize, double_quant):
    model = tiny_llama(torch.bfloat16)
    weights = {name: model.get_submodule(name).weight.clone() for name in linear_names(model)}
    assert quantize_(model, blocksize=blocksize, double_quant=double_quant) is model
    assert nf4_names(model) == weights.keys() - {"lm_head"} and len(weights) == 15
    for name in nf4_names(model):
        q = nf4_quantize(weights[name], blocksize=blocksize, double_quant=double_quant)
        layer = model.get_submodule(name)
        assert torch.equal(layer.nf4.packed, q.packed) and torch.equal(layer.nf4.absmax, q.absmax)
    assert torch.equal(model.lm_head.weight, weights["lm_head"])


def test_skip_modules_takes_names_whole_or_their_ends_in_place_of_the_head(tiny_llama):
    model = quantize_(tiny_llama(), skip_modules=["down_proj", "model.layers.1"])
    dense = linear_names(model) - nf4_names(model)
    layer = {name for name in linear_names(model) if name.startswith("model.layers.1.")}
    assert dense == layer | {"model.layers.0.mlp.down_proj"}
    assert isinstance(model.lm_head, NF4Linear)


def test_a_model_that_is_quantised_in_another_way_is_refused(tiny_llama):
    model = tiny_llama()
    for given in ({"quant_method": "gptq", "bits": 4}, transformers.BitsAndBytesConfig(load_in_8bit=True)):
        model.config.quantization_config = given
        with pytest.raises(ValueError, match=r"is quantised already.*start from the dense checkpoint"):
            quantize_(model)
        assert model.config.quantization_config is given and not nf4_names(model)


def test_the_head_of_a_classifier_stays_dense(tiny_llama):
    model = transformers.LlamaForSequenceClassification(tiny_llama().config)
    quantize_(model)
    assert linear_names(model) - nf4_names(model) == {"score"}


def test_the_last_layer_stays_dense_behind_virtual_tokens():
    model = families.build("bert").bert
    pe.attach(model, pe.PrefixTuningConfig(num_virtual_tokens=2))
    quantize_(model)
    assert type(model.pooler.dense) is torch.nn.Linear and "encoder.layer.1.output.dense" in nf4_names(model)


def test_a_tied_head_stays_dense_even_when_nothing_is_skipped(tiny_llama):
    model = quantize_(tiny_llama(tie_word_embeddings=True), skip_modules=[])
    assert "lm_head" not in nf4_names(model) and len(nf4_names(model)) == 14
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_instance_stays_with_its_hooks_bias_and_references():
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 8))
    first, bias, seen = model[0], model[0].bias, []
    first.register_forward_hook(lambda *_: seen.append(1))
    quantize_(model)
    assert model[0] is first and first.bias is bias and isinstance(first, NF4Linear)
    model(torch.randn(1, 64))
    assert seen == [1]


def test_layers_in_nf4_already_are_left_as_they_are(tiny_llama):
    model = quantize_(tiny_llama(), skip_modules=["lm_head", "model.layers.1"])
    before = model.model.layers[0].mlp.up_proj.weight
    quantize_(model, blocksize=128)
    assert model.model.layers[0].mlp.up_proj.weight is before
    assert model.model.layers[1].mlp.up_proj.blocksize == 128


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_in_a_weight_is_named_and_nothing_is_changed(tiny_llama, bad):
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = bad
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN or inf"):
        quantize_(model)
    assert not nf4_names(model) and not hasattr(model.config, "quantization_config")


def test_what_cannot_be_quantised_is_refused_by_name(tiny_llama):
    class Odd(torch.nn.Linear):
        pass

    model = tiny_llama()
    with pytest.raises(ValueError, match=r"'down_prj', which no module has; near it: down_proj"):
        quantize_(model, skip_modules=["down_prj"])
    with pytest.raises(TypeError, match="list of names, got the string 'lm_head'"):
        quantize_(model, skip_modules="lm_head")
    with pytest.raises(ValueError, match=r"blocksize must be one of .*, got 96"):
        quantize_(model, blocksize=96)
    with pytest.raises(ValueError, match=r"no nn\.Linear left"):
        quantize_(torch.nn.Sequential(torch.nn.ReLU()))
    with pytest.raises(ValueError, match="0 is a Odd, a subclass"):
        quantize_(torch.nn.Sequential(Odd(4, 4), torch.nn.Linear(4, 4)))
    with pytest.raises(
        TypeError, match=r"0\.weight must be float32, bfloat16 or float16, got torch\.float64"
    ):
        quantize_(torch.nn.Sequential(torch.nn.Linear(4, 4).double()))
    with pytest.raises(ValueError, match=r"0\.weight is on the meta device"):
        quantize_(torch.nn.Sequential(torch.nn.Linear(4, 4, device="meta")))
    assert not nf4_names(model)


@pytest.mark.peers
def test_a_model_with_adapters_or_bitsandbytes_layers_is_refused(bnb, tiny_llama):
    peft = pytest.importorskip("peft", reason="PEFT is not installed (the `peers` extra)")
    adapted = peft.get_peft_model(tiny_llama(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"q_proj has an adapter already; quantise first"):
        quantize_(adapted)
    with pytest.raises(ValueError, match=r"0 is bitsandbytes' Linear4bit, quantised already"):
        quantize_(torch.nn.Sequential(bnb.nn.Linear4bit(4, 4), torch.nn.Linear(4, 4)))


@pytest.mark.parametrize(
    "config", [pe.PrefixTuningConfig(num_virtual_tokens=2), pe.BottleneckConfig.houlsby(width=4)]
)
def test_under_an_adapter_that_leaves_the_layers_alone_the_base_is_quantised(config):
    model = pe.attach(families.build("llama"), config)
    quantize_(model)
    assert model(IDS).logits.isfinite().all()
    pe.detach(model)
    assert_same_model(model, quantize_(families.build("llama")))
    assert model.lm_head.weight.requires_grad and not model.model.layers[0].mlp.up_proj.weight.requires_grad


def test_what_an_adapter_trains_in_a_copy_stays_dense():
    config = pe.PrefixTuningConfig(num_virtual_tokens=2, modules_to_save=["up_proj"])
    for active in ("default", None):
        model = pe.attach(families.build("llama"), config)
        pe.active(model, active)
        quantize_(model)
        pe.detach(model)
        assert_same_model(model, quantize_(families.build("llama"), skip_modules=["up_proj", "lm_head"]))


@pytest.mark.peers
def test_peft_trains_an_adapter_over_the_quantised_model(tiny_llama):
    peft = pytest.importorskip("peft", reason="PEFT is not installed (the `peers` extra)")
    model = peft.get_peft_model(
        quantize_(tiny_llama()), peft.LoraConfig(target_modules="all-linear", init_lora_weights=False)
    )
    model(input_ids=IDS, labels=IDS).loss.backward()
    adapters = [p for name, p in model.named_parameters() if "lora_" in name]
    assert len(adapters) == 28 and all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapters)
