"""What else is done with an optimised model: quantise, attach, save, evaluate between two trainings."""

import copy

import pytest
import torch
import transformers
from accuracy import assert_together_twice_as_good

import peft_engine as pe
from peft_engine import native
from peft_engine.heads import FusedHeadLinear
from peft_engine.methods import walks

pytestmark = pytest.mark.skipif(native.load_error() is not None, reason=str(native.load_error()))

IDS = torch.arange(24).reshape(2, 12) * 7 % 101
LORA = pe.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)


def classes(model):
    return {name: type(module) for name, module in model.named_modules()}


def gradients(model, inputs):
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found | {"loss": loss.detach()}


class DenseLora(torch.nn.Module):
    """An adapted dense layer in plain torch, in any dtype, with the same names of parameters."""

    def __init__(self, layer):
        super().__init__()
        self.weight, self.bias, self.scaling = layer.weight, layer.bias, layer.lora["default"].scaling
        self.lora_A, self.lora_B = layer.lora_A, layer.lora_B

    def forward(self, x):
        y = torch.nn.functional.linear(x, self.weight, self.bias)
        return y + self.scaling * (x @ self.lora_A["default"].T) @ self.lora_B["default"].T


def in_float64(model):
    """A copy of a dense model with an adapter, in plain torch and float64."""
    twin = copy.deepcopy(model)
    for name, module in list(twin.named_modules()):
        if hasattr(module, "lora"):
            twin.set_submodule(name, DenseLora(module))
    return twin.double()


def assert_equal_to_rounding(plain, optimised):
    """Loss and gradients over four batches: errors against float64 at most twice those of the plain model."""
    wide, found = in_float64(plain), []
    for ids in (IDS, IDS * 3 % 101, IDS * 5 % 101, IDS.flip(1)):
        inputs = {"input_ids": ids, "labels": ids}
        exact, want, got = (gradients(model, inputs) for model in (wide, plain, optimised))
        assert got.keys() == want.keys() == exact.keys()
        found += [(got[name], want[name], truth) for name, truth in exact.items()]
    assert_together_twice_as_good(found)


@pytest.fixture
def pair(tiny_llama):
    """A factory: a plain model and an optimised copy of it."""

    def make(**changes):
        torch.manual_seed(0)
        plain = tiny_llama(**changes)
        optimised = copy.deepcopy(plain)
        assert pe.optimize(optimised).fused_count > 0
        assert type(optimised.lm_head) is FusedHeadLinear
        return plain, optimised

    return make


def attach_both(models, config):
    for model in models:
        torch.manual_seed(1)  # the same adapter on each
        pe.attach(model, config)


# --- quantise -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_quantising_an_optimised_model_makes_the_layers_that_it_makes_of_a_plain_one(pair, tied):
    plain, optimised = pair(tie_word_embeddings=tied)
    for model in (plain, optimised):
        pe.quantize_(model)
    assert type(optimised.lm_head) is FusedHeadLinear
    assert plain.config.quantization_config == optimised.config.quantization_config
    want, got = plain.state_dict(), optimised.state_dict()
    assert list(want) == list(got) and all(torch.equal(got[name], want[name]) for name in want)
    assert {layer.op for layer in pe.optimize(optimised).layers if not layer.fused} == set()
    assert classes(pe.unoptimize(optimised)) == classes(plain)


def test_quantising_the_head_of_an_optimised_model_is_refused_with_the_mend_and_works_after_it(pair):
    _, model = pair()
    before = classes(model)
    with pytest.raises(ValueError, match=r"lm_head .* optimize; call unoptimize\(model\) first"):
        pe.quantize_(model, skip_modules=[])
    assert classes(model) == before
    pe.quantize_(pe.unoptimize(model), skip_modules=[])
    assert type(model.lm_head) is pe.nn.NF4Linear
    head = next(layer for layer in pe.optimize(model).layers if layer.op == "linear_cross_entropy")
    assert not head.fused and "NF4Linear" in head.reason


# --- attach -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("saved", [None, ["lm_head"]])
def test_an_adapter_on_an_optimised_model_trains_as_on_a_plain_one(pair, saved, tied):
    plain, optimised = pair(tie_word_embeddings=tied)
    config = pe.LoraConfig(r=4, target_modules="all-linear", modules_to_save=saved, init_lora_weights=False)
    attach_both((plain, optimised), config)
    assert type(optimised.lm_head) is FusedHeadLinear
    assert_equal_to_rounding(plain, optimised)
    pe.detach(optimised)
    assert classes(pe.unoptimize(optimised)) == classes(pe.detach(plain))


def test_a_head_trained_whole_on_an_optimised_model_runs_a_mixed_batch_row_by_row(pair):
    plain, optimised = pair()
    config = pe.LoraConfig(r=4, modules_to_save=["lm_head"], init_lora_weights=False)
    attach_both((plain, optimised), config)
    for model in (plain, optimised):
        with torch.no_grad():
            model.lm_head.weight.mul_(1.5)  # the adapter's copy
    outputs = []
    for model in (plain, optimised):
        with pe.active(model, ["default", None]):
            outputs.append(model(input_ids=IDS, labels=IDS))
    torch.testing.assert_close(outputs[1].loss, outputs[0].loss)
    torch.testing.assert_close(outputs[1].logits + 0, outputs[0].logits)


def test_an_adapter_on_the_head_of_an_optimised_model_is_refused_with_the_mend_and_works_after_it(pair):
    plain, model = pair()
    config = pe.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    before = classes(model)
    with pytest.raises(TypeError, match=r"lm_head .* call peft_engine.unoptimize\(model\) first"):
        pe.attach(model, config)
    assert classes(model) == before and not hasattr(model, "peft_engine_adapters")
    pe.unoptimize(model)
    attach_both((plain, model), config)
    made = pe.optimize(model)
    lines = [layer for layer in made.layers if layer.name == "lm_head"]
    assert any(not layer.fused and "LoraLinear" in layer.reason for layer in lines), lines
    assert_equal_to_rounding(plain, model)


def test_optimize_attach_optimize_is_attach_optimize(pair):
    plain, optimised = pair()
    attach_both((plain, optimised), LORA)
    assert pe.optimize(optimised) == pe.optimize(plain)
    assert classes(optimised) == classes(plain)
    got, want = (gradients(model, {"input_ids": IDS, "labels": IDS}) for model in (optimised, plain))
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("quantised", [False, True])
def test_unoptimize_gives_back_classes_attributes_and_hooks_exactly(tiny_llama, quantised, adapted):
    model = tiny_llama()
    if quantised:
        pe.quantize_(model)
    if adapted:
        pe.attach(model, LORA)

    def anatomy():
        walks.forget(model)  # found anew when next asked for
        parts = model.named_modules()
        return {name: (type(m), sorted(m.__dict__), len(m._forward_pre_hooks)) for name, m in parts}

    with torch.no_grad():
        model(input_ids=IDS)  # what a first run leaves behind is not optimize's
    before = anatomy()
    for _ in range(2):
        pe.optimize(model)
        gradients(model, {"input_ids": IDS, "labels": IDS}) if adapted else model(input_ids=IDS)
        model.zero_grad()
        pe.unoptimize(model)
    assert anatomy() == before


# --- save and load ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_an_optimised_model_is_saved_as_the_plain_one_and_loads_anywhere(pair, tmp_path, tied, quantised):
    plain, optimised = pair(tie_word_embeddings=tied)
    for model, folder in ((plain, "plain"), (optimised, "optimised")):
        if quantised:
            pe.quantize_(model)
        model.save_pretrained(tmp_path / folder)
    for file in (tmp_path / "plain").iterdir():
        assert file.read_bytes() == (tmp_path / "optimised" / file.name).read_bytes(), file.name
    load = pe.load_quantized if quantised else transformers.AutoModelForCausalLM.from_pretrained
    again = load(tmp_path / "optimised")
    assert classes(again) == classes(plain)
    with torch.no_grad():
        assert torch.equal(again(input_ids=IDS).logits, plain(input_ids=IDS).logits)


def test_an_adapter_saved_from_an_optimised_model_loads_into_a_plain_and_an_optimised_one(pair, tmp_path):
    plain, optimised = pair()
    trained = copy.deepcopy(optimised)
    pe.attach(trained, pe.LoraConfig(r=4, modules_to_save=["lm_head"], init_lora_weights=False))
    pe.save_adapter(trained, tmp_path)
    with torch.no_grad():
        expected = trained(input_ids=IDS).logits
        for model in (optimised, plain):
            pe.load_adapter(model, tmp_path)
            torch.testing.assert_close(model(input_ids=IDS).logits, expected)
    assert type(optimised.lm_head) is FusedHeadLinear and type(plain.lm_head) is torch.nn.Linear


# --- train --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_before_and_after_an_evaluation_are_equal(tiny_llama, dtype):
    model = pe.attach(pe.quantize_(tiny_llama(dtype)), LORA)
    pe.optimize(model)
    inputs = {"input_ids": IDS, "labels": IDS}
    before = gradients(model.train(), inputs)
    model.eval()
    with torch.no_grad():
        model(**inputs)
    with torch.inference_mode():
        model(**inputs)
    model.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0)
    after = gradients(model.train(), inputs)
    assert len(before) == 29 and before.keys() == after.keys()
    assert all(grad.any() and torch.equal(grad, after[name]) for name, grad in before.items())


@pytest.mark.parametrize("quantised", [False, True])
def test_the_first_losses_of_a_training_are_those_of_the_plain_model(tiny_llama, quantised):
    plain = tiny_llama()
    exact = copy.deepcopy(plain)
    if quantised:
        for name, module in pe.quantize_(plain).named_modules():
            if isinstance(module, pe.nn.NF4Linear):
                exact.get_submodule(name).weight.data = module.dequantize()
    attach_both((plain, exact), LORA)
    exact = in_float64(exact)
    optimised = copy.deepcopy(plain)
    pe.optimize(optimised)

    def losses(model):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        found = []
        for step in range(3):
            ids = (IDS + 5 * step) % 101
            found.append(gradients(model, {"input_ids": ids, "labels": ids})["loss"].double())
            optimizer.step()
        return torch.stack(found)

    truth = losses(exact)
    ulp = torch.finfo(torch.float32).eps * truth.max()
    assert (losses(optimised) - truth).abs().max() <= 2 * (losses(plain) - truth).abs().max() + ulp
    assert truth[0] != truth[1] != truth[2]


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
@pytest.mark.parametrize(
    "config",
    [
        None, pe.LoraConfig(r=4, target_modules="all-linear"), pe.PrefixTuningConfig(num_virtual_tokens=5),
        pe.PromptTuningConfig(num_virtual_tokens=5), pe.BottleneckConfig.pfeiffer(),
    ],
    ids=["none", "lora", "prefix", "prompt", "bottleneck"],
)  # fmt: skip
@pytest.mark.parametrize("optimised", [True, False])
def test_a_float32_model_runs_under_autocast(family, config, optimised):
    """As Trainer(bf16=True) runs it."""
    torch.manual_seed(0)
    kind = getattr(transformers, f"{family}Config")(
        vocab_size=101, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=64,
    )  # fmt: skip
    model = getattr(transformers, f"{family}ForCausalLM")(kind)
    if config is not None:
        pe.attach(model, config)
    if optimised:
        pe.optimize(model)
    exact = gradients(model, {"input_ids": IDS, "labels": IDS})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = gradients(model, {"input_ids": IDS, "labels": IDS})
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        assert model.generate(IDS, max_new_tokens=2, do_sample=False, pad_token_id=0).shape == (2, 14)
    assert rough.keys() == exact.keys()
    for name, grad in exact.items():
        assert (rough[name] - grad).norm() <= 0.05 * grad.norm() + 1e-6, name
