"""LoRA, DoRA and NF4 on transformers' Conv1D, GPT-2's linear layer, whose weight is W^T."""

import copy
import io
import json
import pickle
import subprocess
import sys

import pytest
import torch
import transformers
from accuracy import assert_twice_as_good
from transformers.pytorch_utils import Conv1D

import peft_engine as pe
from peft_engine.merge import merged_weight
from peft_engine.methods.lora_conv1d import LoraConv1D
from peft_engine.nn import NF4Linear

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NO_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
IDS = torch.arange(27).reshape(3, 9) * 5 % 61
VARIANTS = ({}, {"use_dora": True}, {"use_rslora": True, "r": 3})


def gpt2(dtype=torch.float32, kind="GPT2", **fields):
    torch.manual_seed(0)
    sizes = {"n_embd": 48, "n_layer": 2, "n_head": 4, "vocab_size": 61, "n_positions": 32}
    config = getattr(transformers, f"{kind}Config")
    config = config(bos_token_id=1, eos_token_id=2, **(NO_DROPOUT | sizes | fields))
    return getattr(transformers, f"{kind}LMHeadModel")(config).to(dtype).eval()


def lora(**fields):
    settings = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False} | fields
    return pe.LoraConfig(**settings)


def adapted(model=None, name="default", **fields):
    torch.manual_seed(1)
    return pe.attach(gpt2() if model is None else model, lora(**fields), name=name)


def conv1ds(model):
    return {path: m for path, m in model.named_modules() if isinstance(m, Conv1D)}


def folded(model, name="default"):
    """A copy whose weights are W + s B A, by the definition, in float64."""
    twin = copy.deepcopy(model).double()
    for path, layer in conv1ds(model).items():
        s, a, b = layer.lora[name].scaling, layer.lora_A[name].double(), layer.lora_B[name].double()
        w = layer.weight.double() + (s * b @ a).t()
        if layer.lora[name].dora:
            w = w * (layer.lora_magnitude_vector[name].double() / w.norm(dim=0))
        twin.get_submodule(path).weight.data.copy_(w)
    with torch.no_grad():
        pe.detach(twin)
    return twin


@pytest.mark.parametrize("kind", ["GPT2", "OpenAIGPT"])
@pytest.mark.parametrize("fields", VARIANTS)
def test_the_logits_are_those_of_the_folded_weights(kind, fields):
    model = adapted(gpt2(kind=kind), **fields)
    assert all(type(m) is LoraConv1D for m in conv1ds(model).values()) and len(conv1ds(model)) == 8
    with torch.no_grad():
        torch.testing.assert_close(
            model(IDS).logits.double(), folded(model)(IDS).logits, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("rows", [1, 7, 70])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_layer_is_as_good_as_a_linear_one_with_the_transposed_weight(dtype, rows):
    torch.manual_seed(rows)
    conv, linear = Conv1D(40, 72).to(dtype), torch.nn.Linear(72, 40).to(dtype)
    linear.weight.data.copy_(conv.weight.data.t())
    conv.bias.data.normal_()
    linear.bias.data.copy_(conv.bias.data)
    layers = [pe.attach(torch.nn.Sequential(m), lora(target_modules=["0"])) for m in (conv, linear)]
    layers[1][0].load_state_dict(
        {k: v.t() if k == "weight" else v for k, v in layers[0][0].state_dict().items()}
    )
    x, dy = torch.randn(rows, 72).to(dtype), torch.randn(rows, 40).to(dtype)
    results = []
    for model in layers:
        inputs = [x.clone().requires_grad_(), model[0].lora_A["default"], model[0].lora_B["default"]]
        y = model(inputs[0])
        results.append((y, *torch.autograd.grad(y, inputs, dy)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_detach_gives_back_the_model_to_the_bit_and_its_strides():
    model = gpt2()
    before = {n: (p, p.detach().clone(), p.stride()) for n, p in model.named_parameters()}
    logits = model(IDS).logits
    adapted(model)
    adapted(model, "other")
    assert all(m.weight.t().is_contiguous() for m in conv1ds(model).values())
    pe.detach(model, "other")
    assert all(m.weight.t().is_contiguous() for m in conv1ds(model).values())
    pe.detach(model)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys() and all(type(m) is Conv1D for m in conv1ds(model).values())
    for name, (parameter, value, stride) in before.items():
        assert after[name] is parameter and torch.equal(parameter, value) and parameter.stride() == stride
    assert torch.equal(model(IDS).logits, logits)


def test_a_step_trains_the_adapter_alone():
    model = adapted(init_lora_weights=True).train()
    model(IDS, labels=IDS).loss.backward()
    learning = {n for n, p in model.named_parameters() if p.grad is not None}
    assert len(learning) == 16 and all("lora_" in name for name in learning)
    assert all(m.lora_B["default"].grad.any() for m in conv1ds(model).values())


def test_dropout_of_the_adapter_is_that_of_its_seed():
    model = adapted(lora_dropout=0.5).train()
    torch.manual_seed(3)
    first = model(IDS).logits
    torch.manual_seed(3)
    assert torch.equal(model(IDS).logits, first)
    assert not torch.equal(model(IDS).logits, first)


def test_each_row_of_a_batch_may_name_its_adapter():
    model = adapted(adapted(), "dora", use_dora=True)
    alone = []
    for name in ("dora", None, "default"):
        with pe.active(model, name), torch.no_grad():
            alone.append(model(IDS).logits)
    with pe.active(model, ["dora", None, "default"]), torch.no_grad():
        mixed = model(IDS).logits
    for row, logits in enumerate(alone):
        assert torch.equal(mixed[row], logits[row])


@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), "torch.save"])
def test_copies_and_pickles_work(way):
    model = adapted()
    if way == "torch.save":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    else:
        twin = way(model)
    assert torch.equal(twin(IDS).logits, model(IDS).logits)
    assert all(m.weight.t().is_contiguous() for m in conv1ds(twin).values())


def test_another_process_knows_a_pickled_layer(tmp_path):
    model = adapted()
    (tmp_path / "model").write_bytes(pickle.dumps(model))
    code = (
        "import pickle, sys, peft_engine as pe\n"
        "model = pickle.load(open(sys.argv[1], 'rb'))\n"
        "pe.active(model, None); pe.active(model, 'default'); pe.detach(model)\n"
        "print(type(model.transformer.h[0].mlp.c_fc).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "model"], capture_output=True, text=True)
    assert done.stdout.strip() == "Conv1D", done.stderr


def test_it_compiles_without_a_break():
    model = adapted(gpt2(n_layer=1))
    wanted = model(IDS, use_cache=False).logits
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(IDS, use_cache=False).logits, wanted)


@pytest.mark.parametrize("fields", VARIANTS)
def test_a_merge_gives_the_folded_weight_in_the_layout_of_the_base(fields):
    model = adapted(**fields)
    twin = folded(model)
    pe.merge_(model)
    for path, layer in conv1ds(model).items():
        assert type(layer) is Conv1D and layer.weight.is_contiguous()
        wanted = twin.get_submodule(path).weight
        torch.testing.assert_close(layer.weight.double(), wanted, rtol=1e-6, atol=1e-6)


def test_files_go_both_ways(tmp_path):
    model = adapted(use_dora=True)
    pe.save_adapter(model, tmp_path / "a")
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    again = gpt2()
    pe.load_adapter(again, tmp_path / "a")
    assert torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.mark.peers
@pytest.mark.parametrize("fields", VARIANTS)
def test_peft_computes_the_same_from_the_same_file(fields, tmp_path):
    peft = pytest.importorskip("peft", reason="PEFT is not installed (the peers extra)")
    model = adapted(**fields)
    pe.save_adapter(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(gpt2(), str(tmp_path / "ours")).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS).logits, model(IDS).logits)
    theirs.save_pretrained(tmp_path / "theirs")
    again = gpt2()
    pe.load_adapter(again, tmp_path / "theirs")
    assert torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.mark.peers
@pytest.mark.parametrize("fields", ({}, {"use_dora": True}))
def test_pefts_own_layers_are_fused_and_left_as_they_were(fields):
    peft = pytest.importorskip("peft", reason="PEFT is not installed (the peers extra)")
    settings = {"r": 4, "target_modules": ["c_attn", "c_fc", "c_proj"], "init_lora_weights": False}
    model = peft.get_peft_model(gpt2(), peft.LoraConfig(**settings, fan_in_fan_out=True, **fields))

    def run():
        model.zero_grad()
        out = model(IDS, labels=IDS)
        out.loss.backward()
        return out.logits.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    logits, grads = run()
    report = pe.optimize(model)
    assert sum(line.fused for line in report.layers if line.kind.startswith("peft")) == 8
    fused, fused_grads = run()
    torch.testing.assert_close(fused, logits)
    torch.testing.assert_close(fused_grads, grads)
    pe.unoptimize(model)
    assert all(p.is_contiguous() for p in model.parameters())
    assert torch.equal(run()[0], logits)


# --- NF4 ----------------------------------------------------------------------------------------------------


def quantized(**fields):
    return pe.quantize_(gpt2(torch.bfloat16, **fields))


@pytest.mark.peers
def test_a_layer_that_peft_has_left_lies_as_it_was_made_once_the_model_is_unoptimised(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed (the `peers` extra)")
    config = peft.LoraConfig(r=2, target_modules=["c_fc"], fan_in_fan_out=True)
    model = peft.get_peft_model(gpt2(), config)
    pe.optimize(model)
    left = model.merge_and_unload()
    pe.unoptimize(left)
    left.save_pretrained(tmp_path)
    assert all(p.is_contiguous() for p in left.parameters())


def test_a_quantised_layer_multiplies_by_the_rounded_weight():
    dense, model = gpt2(torch.float32), quantized()
    layers = {path: m for path, m in model.named_modules() if isinstance(m, NF4Linear)}
    assert len(layers) == 8 and not conv1ds(model)
    for path, layer in layers.items():
        weight = dense.get_submodule(path).weight.t()
        assert (layer.out_features, layer.in_features) == tuple(weight.shape)
        assert (layer.dequantize(torch.float32) - weight).norm() < 0.12 * weight.norm()
    for path, layer in layers.items():
        dense.get_submodule(path).weight.data.copy_(layer.dequantize(torch.float32).t())
    with torch.no_grad():
        wanted, plain = dense(IDS).logits.double(), copy.deepcopy(dense).to(torch.bfloat16)(IDS).logits
        assert_twice_as_good(model(IDS).logits, plain, wanted, wanted.abs(), "logits")


def test_a_saved_model_and_a_dense_checkpoint_load_as_quantised(tmp_path):
    model = quantized()
    model.save_pretrained(tmp_path / "nf4")
    gpt2(torch.bfloat16).save_pretrained(tmp_path / "dense")
    for folder in ("nf4", "dense"):
        again = pe.load_quantized(tmp_path / folder)
        assert torch.equal(again(IDS).logits, model(IDS).logits), folder


def test_qlora_trains_and_merges_into_a_model_that_loads(tmp_path):
    model = quantized()
    adapted(model)
    model(IDS, labels=IDS).loss.backward()
    adapted_layers = {path: m for path, m in model.named_modules() if isinstance(m, NF4Linear)}
    wanted = {path: merged_weight(m, "default").to(torch.bfloat16) for path, m in adapted_layers.items()}
    pe.merge_(model)
    assert all(type(m) is Conv1D and m.weight.is_contiguous() for m in conv1ds(model).values())
    assert len(conv1ds(model)) == 8 and not hasattr(model.transformer.h[0].mlp.c_fc, "in_features")
    assert all(torch.equal(m.weight.t(), wanted[path]) for path, m in conv1ds(model).items())
    model.save_pretrained(tmp_path)
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.mark.peers
def test_bitsandbytes_has_the_same_bytes_and_reads_ours(tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (the peers extra)")
    model = quantized()
    model.save_pretrained(tmp_path / "ours")
    gpt2(torch.bfloat16).save_pretrained(tmp_path / "dense")
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    load = transformers.GPT2LMHeadModel.from_pretrained
    for theirs in (load(tmp_path / "ours"), load(tmp_path / "dense", quantization_config=settings)):
        for path, layer in model.named_modules():
            if isinstance(layer, NF4Linear):
                assert torch.equal(theirs.get_submodule(path).weight.flatten(), layer.weight.flatten()), path
    theirs.save_pretrained(tmp_path / "theirs")
    assert torch.equal(pe.load_quantized(tmp_path / "theirs")(IDS).logits, model(IDS).logits)
