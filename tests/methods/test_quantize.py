"""quantize_, load_quantized and NF4Linear: what becomes NF4, what is refused, and files both ways."""

import copy
import json
import math
import pickle
import shutil
import subprocess
import sys

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers

from peft_engine.nn import NF4Linear
from peft_engine.ops.nf4 import BLOCKSIZES, DTYPES, nf4_quantize
from peft_engine.quantize import load_quantized, quantize_

IDS = torch.arange(3, 15)[None]


@pytest.fixture(autouse=True)
def _quiet():
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture
def bnb():
    return pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (the `peers` extra)")


@pytest.fixture
def saved(tiny_llama, tmp_path):
    """A folder with a tiny bf16 Llama in several shards."""
    tiny_llama(torch.bfloat16).save_pretrained(tmp_path / "dense", max_shard_size="40KB")
    assert len(list((tmp_path / "dense").glob("*.safetensors"))) > 2
    return tmp_path / "dense"


def nf4_names(model):
    return {name for name, module in model.named_modules() if isinstance(module, NF4Linear)}


def linear_names(model):
    return {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}


def assert_same_model(a, b):
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert torch.equal(a(IDS).logits, b(IDS).logits)


def edit(folder, change):
    """Rewrites the tensors of a checkpoint as one file after `change` has had its way with them."""
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= safetensors.torch.load_file(file)
        file.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    change(tensors)
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})


# --- NF4Linear -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_layer_computes_with_the_dequantised_weight(dtype, bias):
    dense = torch.nn.Linear(70, 33, bias=bias).to(dtype)
    layer = NF4Linear.from_linear(dense)
    x = torch.randn(2, 5, 70).to(dtype)
    exact = F.linear(x.double(), layer.dequantize().double(), dense.bias.double() if bias else None)
    plain = F.linear(x, layer.dequantize(), dense.bias)
    error, allowed = (layer(x).double() - exact).abs(), (plain.double() - exact).abs()
    ulp = torch.finfo(dtype).eps * exact.abs().max()
    assert error.max() <= 2 * allowed.max() + ulp and error.norm() <= 2 * allowed.norm() + ulp


def test_gradient_reaches_the_input_and_the_bias_but_not_the_weight():
    layer = NF4Linear(64, 32)
    x = torch.randn(3, 64, requires_grad=True)
    layer(x).sum().backward()
    assert torch.allclose(x.grad, layer.dequantize().sum(0).expand(3, 64))
    assert torch.equal(layer.bias.grad, torch.full((32,), 3.0)) and layer.weight.grad is None


def test_compute_dtype_is_used_for_the_product_and_the_inputs_dtype_returned():
    layer = NF4Linear(64, 32, bias=False)
    x = torch.randn(3, 64)
    layer.compute_dtype = torch.bfloat16
    assert layer(x).dtype == torch.float32
    assert torch.equal(layer(x), layer(x.bfloat16()).float())


def test_a_cast_leaves_the_packed_weight_and_its_scales():
    for double_quant in (True, False):
        layer = NF4Linear(64, 32, double_quant=double_quant)
        before = copy.deepcopy(layer.state_dict())
        layer.to(torch.bfloat16).half()
        assert layer.bias.dtype == torch.float16
        del before["bias"]
        assert all(
            torch.equal(layer.state_dict()[k], v) and layer.state_dict()[k].dtype == v.dtype
            for k, v in before.items()
        )
        assert layer(torch.randn(1, 64).half()).dtype == torch.float16


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_computes_the_same_and_shares_nothing(duplicate):
    layer, x = NF4Linear(64, 32), torch.randn(3, 64)
    before = layer(x)
    other = duplicate(layer)
    assert torch.equal(other(x), before)
    with torch.no_grad():
        other.weight.zero_()
    assert torch.equal(layer(x), before) and not torch.equal(other(x), before)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("double_quant", [False, True])
def test_state_dict_goes_from_one_layer_to_another(double_quant, assign):
    layer = NF4Linear(64, 33, dtype=torch.bfloat16, blocksize=128, double_quant=double_quant)
    other = NF4Linear(64, 33, dtype=torch.bfloat16)
    other.load_state_dict(layer.state_dict(), assign=assign)
    x = torch.randn(3, 64).bfloat16()
    assert torch.equal(other(x), layer(x)) and other.blocksize == 128
    assert all(torch.equal(other.state_dict()[key], value) for key, value in layer.state_dict().items())


def test_a_layer_on_meta_is_filled_by_assigning_a_state_dict():
    layer = NF4Linear(64, 32)
    empty = NF4Linear(64, 32, device="meta")
    empty.load_state_dict(layer.state_dict(), assign=True)
    x = torch.randn(3, 64)
    assert torch.equal(empty(x), layer(x))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s.pop("weight"), "the quant_state is incomplete"),
        (lambda s: s.pop("weight.absmax"), "weight.absmax"),
        (lambda s: s.update({"weight.extra": torch.zeros(1)}), "weight.extra"),
        (lambda s: [s.pop(k) for k in list(s) if k.startswith("weight")], "Missing key.*weight"),
        (lambda s: s.update(NF4Linear(32, 64).state_dict()), r"must have shape \(32, 64\), got \(64, 32\)"),
        (
            lambda s: [s.pop(k) for k in list(s)[2:]] and s.update(torch.nn.Linear(64, 32).state_dict()),
            "dense weight",
        ),
    ],
)
def test_a_state_dict_that_does_not_fit_is_refused(change, says):
    state = NF4Linear(64, 32).state_dict()
    change(state)
    with pytest.raises(RuntimeError, match=says):
        NF4Linear(64, 32).load_state_dict(state)


@pytest.mark.peers
@pytest.mark.parametrize("double_quant", [False, True])
def test_state_dict_is_that_of_bitsandbytes_linear4bit(bnb, double_quant):
    dense = torch.nn.Linear(96, 40).bfloat16()
    theirs = bnb.nn.Linear4bit(96, 40, compute_dtype=torch.bfloat16, quant_type="nf4")
    theirs.weight = bnb.nn.Params4bit(
        dense.weight.data, False, compress_statistics=double_quant, quant_type="nf4", module=theirs
    )
    theirs.bias = dense.bias
    theirs = theirs.to("cpu")
    expected = theirs.state_dict()
    ours = NF4Linear.from_linear(dense, double_quant=double_quant)
    assert ours.state_dict().keys() == expected.keys()
    assert all(torch.equal(v, expected[k]) for k, v in ours.state_dict().items())
    fresh = NF4Linear(96, 40, dtype=torch.bfloat16)
    fresh.load_state_dict(expected)
    assert torch.equal(fresh.dequantize(), ours.dequantize())


# --- quantize_ -----------------------------------------------------------------------------------------


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
    with pytest.raises(ValueError, match="0 is a transformers Conv1D"):
        quantize_(torch.nn.Sequential(transformers.pytorch_utils.Conv1D(4, 4), torch.nn.Linear(4, 4)))
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


@pytest.mark.peers
def test_peft_trains_an_adapter_over_the_quantised_model(tiny_llama):
    peft = pytest.importorskip("peft", reason="PEFT is not installed (the `peers` extra)")
    model = peft.get_peft_model(
        quantize_(tiny_llama()), peft.LoraConfig(target_modules="all-linear", init_lora_weights=False)
    )
    model(input_ids=IDS, labels=IDS).loss.backward()
    adapters = [p for name, p in model.named_parameters() if "lora_" in name]
    assert len(adapters) == 28 and all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapters)


# --- load_quantized ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, *DTYPES])
def test_reading_by_shards_gives_the_model_quantised_in_place(backend, saved, dtype):
    dense = transformers.AutoModelForCausalLM.from_pretrained(saved, dtype=dtype or "auto")
    arguments = {} if dtype is None else {"dtype": dtype}
    model = load_quantized(saved, blocksize=128, double_quant=False, **arguments)
    quantize_(dense, blocksize=128, double_quant=False)
    assert_same_model(model, dense)
    assert type(model) is transformers.LlamaForCausalLM and not model.training
    assert model.dtype == (dtype or torch.bfloat16)
    assert model.config.quantization_config == dense.config.quantization_config


def test_what_it_returns_can_be_cast_copied_and_moved_like_a_plain_model(saved):
    model = load_quantized(saved, attn_implementation="eager")
    assert model.config._attn_implementation == "eager"
    assert copy.deepcopy(model).to(torch.float32)(IDS).logits.dtype == torch.float32
    assert not any(hasattr(model, name) for name in ("hf_quantizer", "quantization_method"))


def test_skip_modules_reach_the_reader(saved):
    model = load_quantized(saved, skip_modules=["down_proj"])
    assert linear_names(model) - nf4_names(model) == {f"model.layers.{i}.mlp.down_proj" for i in (0, 1)}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("double_quant", [True, False])
def test_a_quantised_model_saved_here_loads_here_as_it_is(tiny_llama, tmp_path, double_quant, tied):
    model = tiny_llama(torch.bfloat16, tie_word_embeddings=tied)
    quantize_(model, blocksize=256, double_quant=double_quant, skip_modules=["lm_head", "o_proj"])
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    back = load_quantized(tmp_path)
    assert_same_model(back, model)
    assert back.model.layers[0].mlp.up_proj.blocksize == 256 and len(nf4_names(back)) == 12
    back.save_pretrained(tmp_path / "again")
    assert_same_model(load_quantized(tmp_path / "again"), model)


@pytest.mark.peers
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_saved_here_loads_in_transformers_with_bitsandbytes(
    bnb, tiny_llama, tmp_path, dtype, double_quant
):
    # bitsandbytes' CPU dequantise is wrong where rows are no multiple of the block: 128 here.
    model = quantize_(tiny_llama(dtype, intermediate_size=128), double_quant=double_quant)
    model.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    for name in linear_names(model):
        layer, ours = theirs.get_submodule(name), model.get_submodule(name)
        assert isinstance(layer, bnb.nn.Linear4bit) == isinstance(ours, NF4Linear)
        assert all(torch.equal(v, layer.state_dict()[k]) for k, v in ours.state_dict().items())
        if isinstance(ours, NF4Linear):
            restored = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            assert torch.equal(restored, ours.dequantize()) and layer.compute_dtype == dtype


@pytest.mark.peers
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("double_quant", [True, False])
def test_what_transformers_saved_with_bitsandbytes_loads_here(bnb, saved, tmp_path, double_quant, storage):
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=torch.bfloat16, bnb_4bit_quant_storage=storage,
    )  # fmt: skip
    theirs = transformers.AutoModelForCausalLM.from_pretrained(saved, quantization_config=settings)
    theirs.save_pretrained(tmp_path / "theirs")
    assert_same_model(load_quantized(tmp_path / "theirs"), load_quantized(saved, double_quant=double_quant))
    cast = load_quantized(tmp_path / "theirs", dtype=torch.float32)
    assert cast.lm_head.weight.dtype == cast.model.norm.weight.dtype == torch.float32


MEASURE = """
import json, os, sys, threading
os.environ["HF_HUB_OFFLINE"] = "1"
import torch, transformers
from transformers.models.llama import modeling_llama
from peft_engine.quantize import load_quantized
import peft_engine.loading
torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()

def anonymous():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

load_quantized(sys.argv[1])  # what is imported and built on first use is no part of the model
before = peak = anonymous()
stop = threading.Event()

def watch():
    global peak
    while not stop.wait(0.001):
        peak = max(peak, anonymous())

thread = threading.Thread(target=watch)
thread.start()
model = load_quantized(sys.argv[2])
stop.set()
thread.join()
held = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
print(json.dumps({"peak": peak - before, "held": held}))
"""


def test_peak_memory_is_the_quantised_model_and_its_largest_layer(saved, tmp_path):
    layers, hidden, inner = 3, 1024, 4096
    settings = json.loads((saved / "config.json").read_text()) | {
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "head_dim": 256,
        "num_key_value_heads": 4, "vocab_size": 128,
    }  # fmt: skip
    folder = tmp_path / "large"
    with torch.device("meta"):
        skeleton = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))
    tensors = {
        name: torch.randn(1 << 16).bfloat16().repeat(-(-p.numel() // (1 << 16)))[: p.numel()].view(p.shape)
        for name, p in skeleton.named_parameters()
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings))
    index = {"metadata": {}, "weight_map": {}}
    for shard in range(layers):
        part = {
            k: v
            for k, v in tensors.items()
            if (f"layers.{shard}." in k) or ("layers" not in k and shard == 0)
        }
        safetensors.torch.save_file(part, folder / f"{shard}.safetensors", {"format": "pt"})
        index["weight_map"] |= dict.fromkeys(part, f"{shard}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    dense = sum(t.numel() * 2 for t in tensors.values())
    done = subprocess.run([sys.executable, "-c", MEASURE, saved, folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    largest, working = 2 * hidden * inner, 4 << 20  # the reference works on 65,536 values at a time, in fp32
    assert result["held"] < 0.3 * dense
    assert result["peak"] <= result["held"] + largest + working, (result, dense)


# --- what load_quantized refuses -----------------------------------------------------------------------


def test_a_missing_folder_or_unreachable_hub_names_the_local_option(tmp_path):
    for path in (str(tmp_path / "nowhere"), "someone/some-model"):
        with pytest.raises(OSError, match=r"is no folder here.* hub .*give the path of a local folder"):
            load_quantized(path)


def test_a_folder_without_a_config_or_safetensors_is_refused(saved, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match=r"has no config\.json"):
        load_quantized(tmp_path / "empty")
    for file in saved.glob("*.safetensors*"):
        file.unlink()
    torch.save({}, saved / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        load_quantized(saved)


def test_gguf_is_refused_with_the_way_round(tmp_path):
    with pytest.raises(ValueError, match=r"gguf_file is not taken: .*quantize_ the model"):
        load_quantized(tmp_path, gguf_file="model.gguf")


def test_nan_in_a_file_is_named(saved):
    def spoil(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = math.nan

    edit(saved, spoil)
    with pytest.raises(ValueError, match=r"load_quantized: model\.layers\.1\.mlp\.up_proj\.weight holds NaN"):
        load_quantized(saved)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda t: t.pop("model.layers.1.mlp.up_proj.weight"),
            r"missing keys .*layers\.1\.mlp\.up_proj\.weight",
        ),
        (lambda t: t.pop("model.norm.weight"), r"missing keys .*model\.norm\.weight"),
        (
            lambda t: t.update({"model.surplus.weight": torch.ones(2)}),
            r"unexpected keys .*model\.surplus\.weight",
        ),
    ],
)
def test_missing_and_surplus_weights_are_named(saved, change, says):
    edit(saved, change)
    with pytest.raises(ValueError, match=says):
        load_quantized(saved)


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"])
def test_a_weight_of_another_shape_is_named(saved, name):
    edit(saved, lambda t: t.update({name: torch.ones(96, 60)}))
    with pytest.raises(ValueError, match=rf"{name}: config.json makes it \(.*, the file holds \(96, 60\)"):
        load_quantized(saved)


def test_broken_nf4_tensors_in_a_file_are_named(tiny_llama, tmp_path):
    quantize_(tiny_llama()).save_pretrained(tmp_path / "whole")
    name = "model.layers.0.mlp.up_proj.weight"
    for change, says in (
        (lambda t: t.pop(f"{name}.absmax"), f"{name}.*absmax"),
        (lambda t: t.pop(f"{name}.quant_state.bitsandbytes__nf4"), f"{name}.*quant_state"),
        (lambda t: t.update({f"{name}.nested_absmax": torch.ones(7)}), f"{name}.*nested_absmax"),
    ):
        shutil.copytree(tmp_path / "whole", tmp_path / "broken", dirs_exist_ok=True)
        edit(tmp_path / "broken", change)
        with pytest.raises(ValueError, match=says):
            load_quantized(tmp_path / "broken")


@pytest.mark.parametrize(
    ("stored", "says"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "fp4"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes"),
    ],
)
def test_a_checkpoint_quantised_in_another_way_is_refused(saved, stored, says):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"quantization_config": stored}))
    with pytest.raises(ValueError, match=f"is quantised already, in '{says}'"):
        load_quantized(saved)
