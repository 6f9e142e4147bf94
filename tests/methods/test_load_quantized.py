"""load_quantized: the model of quantize_ in less memory, files both ways with bitsandbytes, bad files."""

import copy
import json
import math
import os
import shutil
import subprocess
import sys

import pytest
import safetensors.torch
import torch
import transformers
from quantized_cases import IDS, assert_same_model, linear_names, nf4_names

from peft_engine.nn import NF4Linear
from peft_engine.ops.nf4 import DTYPES
from peft_engine.quantize import load_quantized, quantize_


@pytest.fixture(autouse=True)
def _quiet():
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture
def saved(tiny_llama, tmp_path):
    """A folder with a tiny bf16 Llama in several shards."""
    tiny_llama(torch.bfloat16).save_pretrained(tmp_path / "dense", max_shard_size="40KB")
    assert len(list((tmp_path / "dense").glob("*.safetensors"))) > 2
    return tmp_path / "dense"


def edit(folder, change):
    """Rewrites the tensors of a checkpoint as one file after `change` has had its way with them."""
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= safetensors.torch.load_file(file)
        file.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    change(tensors)
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})


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
    assert theirs.config.quantization_config.bnb_4bit_use_double_quant == double_quant
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
model = load_quantized(sys.argv[2], dtype=torch.float16)  # a cast: what is read is copied, not mapped
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
    # What is freed goes back at once: by default glibc keeps up to twice the largest block it has seen freed.
    settings = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 15), "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, saved, folder], capture_output=True, text=True, env=settings
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    largest, working = 2 * hidden * inner, 4 << 20  # the reference works on 65,536 values at a time, in fp32
    assert result["held"] < 0.3 * dense
    assert result["peak"] <= result["held"] + largest + working, (result, dense)


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
    says = r"holds pytorch_model\.bin and no safetensors.*LlamaForCausalLM\.from_pretrained.*save_pretrained"
    with pytest.raises(OSError, match=says):
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
        (
            lambda t: t.update(NF4Linear(8, 8).nf4.to_bnb_state_dict(name)),
            f"{name}.*makes it .*the file holds",
        ),
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


def test_a_shard_cut_short_or_missing_is_named(saved):
    shard = sorted(saved.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:5000])
    with pytest.raises(ValueError, match=f"{shard.name} is no whole safetensors file"):
        load_quantized(saved)
    shard.unlink()
    says = rf"{saved}: its model.safetensors.index.json names {shard.name}, of \d+ shards.*download what is"
    with pytest.raises(FileNotFoundError, match=says):
        load_quantized(saved)


def _reindex(folder, change):
    """Puts what `change` makes of the name of a shard into the index, in place of its name."""
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    shard = sorted(content["weight_map"].values())[0]
    names = {key: change(name) if name == shard else name for key, name in content["weight_map"].items()}
    index.write_text(json.dumps(content | {"weight_map": names}))
    return shard


@pytest.mark.parametrize("absolute", [True, False])
def test_a_shard_outside_of_the_folder_is_refused(saved, tmp_path, absolute):
    other = tmp_path / "other"
    other.mkdir()
    start = other if absolute else f"sub/../../{other.name}"
    shard = _reindex(saved, lambda name: f"{start}/{name}")
    (saved / shard).rename(other / shard)
    (saved / "sub").mkdir()
    with pytest.raises(ValueError, match=f"{start}/{shard}, outside of the folder; .*mend the index"):
        load_quantized(saved)


def test_a_shard_may_be_a_link_as_in_the_cache_of_the_hub_or_lie_in_a_folder_below(saved, tmp_path):
    shard = _reindex(saved, lambda name: f"below/{name}")
    (tmp_path / "blob").write_bytes((saved / shard).read_bytes())
    (saved / shard).unlink()
    (saved / "below").mkdir()
    (saved / "below" / shard).symlink_to(tmp_path / "blob")
    load_quantized(saved)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}'])
def test_an_index_that_is_none_is_named(saved, content):
    (saved / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"its model\.safetensors\.index\.json is no index of shards"):
        load_quantized(saved)
