"""Adapter files that are not loaded: each with its reason, and the model left as it was."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from method_cases import edit_config, edit_weights, refused, shake
from torch import nn

from peft_engine.adapter_files import read_header
from peft_engine.checkpoint import CONFIG, WEIGHTS, load_adapter, save_adapter
from peft_engine.methods import LoraConfig, attach, detach


def test_an_unknown_config_key_is_named(llama, saved):
    edit_config(saved, lora_gamma=3, peft_version="0.21.2")
    refused(llama(), saved, "adapter_config.json: unknown key 'lora_gamma'$")
    edit_config(saved, peft_version="0.33.0")
    refused(llama(), saved, "'lora_gamma'; it was written by PEFT 0.33.0, newer than")


@pytest.mark.parametrize(
    "changes",
    [
        dict(use_qalora=True),
        dict(layer_replication=[[0, 2]]),
        dict(trainable_token_indices=[3]),
        dict(lora_bias=True),
    ],
)
def test_a_method_that_is_not_offered_is_named(llama, saved, changes):
    edit_config(saved, **changes)
    refused(llama(), saved, f"{next(iter(changes))}=.* is not supported")


def test_how_the_adapter_started_matters_only_when_it_changed_the_base(llama, saved):
    for start in ("eva", "orthogonal", "gaussian", False):
        edit_config(saved, init_lora_weights=start)
        load_adapter(llama(), saved)
    for start in ("pissa", "pissa_niter_4", "olora", "loftq"):
        edit_config(saved, init_lora_weights=start)
        refused(llama(), saved, f"'{start}' took the adapter's start out of the base's weights")
    edit_config(saved, init_lora_weights="magic")
    refused(llama(), saved, "init_lora_weights must be one of")


def test_pefts_fields_that_say_nothing_are_taken(llama, saved):
    edit_config(
        saved,
        auto_mapping={"base_model_class": "Llama"},
        peft_version="0.99.9",
        inference_mode=False,
        megatron_core="megatron.core",
        loftq_config={},
        eva_config=None,
        revision="main",
        qalora_group_size=32,
    )
    load_adapter(llama(), saved)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON"),
        ("[1]", "expected a JSON object, got list"),
        ('{"r": 4}', "peft_type must be 'LORA', got None"),
        ('{"peft_type": "IA3"}', "got 'IA3'"),
        ('{"peft_type": "LORA", "r": "4"}', "r must be an integer"),
        ('{"peft_type": "LORA", "r": 1e999}', "r must be an integer"),
        ('{"peft_type": "LORA", "target_modules": {"a": 1}}', "targets nothing|match no module"),
        ("[" * 100_000, "is no JSON"),
        (" " * (1 << 21), "a config has at most"),
    ],
)
def test_a_broken_config_is_refused(llama, saved, text, message):
    (saved / CONFIG).write_text(text)
    refused(llama(), saved, message)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["q_proj", "("]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=4,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.dictionaries(
        st.sampled_from([f.name for f in fields(LoraConfig)]), JSON, min_size=1, max_size=3
    )
)
def test_whatever_a_config_holds_it_loads_or_a_value_error_says_why(untouched, changes):
    model, saved = untouched
    text = (saved / CONFIG).read_text()
    edit_config(saved, **changes)
    try:
        load_adapter(model, saved)
        detach(model)
    except ValueError as error:
        assert str(saved) in str(error)
    finally:
        (saved / CONFIG).write_text(text)


@pytest.fixture
def untouched(llama, saved):
    return llama(), saved


def test_a_pickle_is_refused(llama, saved):
    torch.save({"a": torch.zeros(1)}, saved / WEIGHTS)
    refused(llama(), saved, "is a pickle under another name")
    (saved / WEIGHTS).rename(saved / "adapter_model.bin")
    refused(llama(), saved, "adapter_model.bin is a pickle.*safe_serialization")


def test_missing_files_are_named(llama, saved, tmp_path):
    refused(llama(), tmp_path / "none", "is no folder", FileNotFoundError)
    weights = (saved / WEIGHTS).rename(tmp_path / "elsewhere")
    refused(llama(), saved, f"has no {WEIGHTS}", FileNotFoundError)
    weights.rename(saved / WEIGHTS)
    (saved / CONFIG).unlink()
    refused(llama(), saved, f"has no {CONFIG}", FileNotFoundError)


def test_every_key_that_does_not_land_is_listed(llama, saved):
    def change(held):
        held = dict(held)
        first, second, third = list(held)[:3]
        held["base_model.model.model.layers.7.q_proj.lora_A.weight"] = held.pop(first)
        held[second] = held[second][:, :-1].contiguous()
        held["module." + third] = held[third].clone()
        change.names = first, second, third
        return held

    edit_weights(saved, change)
    with pytest.raises(ValueError) as caught:
        load_adapter(llama(), saved)
    text = str(caught.value)
    missing, shape, twice = change.names
    assert f"1 missing: {missing}" in text
    assert "1 with no place in the model: base_model.model.model.layers.7.q_proj.lora_A.weight" in text
    assert "1 of another shape: " in text and f"{shape} must be (" in text
    assert "1 there twice" in text and twice in text


@pytest.mark.parametrize("front", ["module.", "base_model.model."])
def test_a_key_behind_any_number_of_wrappers_is_read_or_refused(llama, saved, front):
    edit_weights(saved, lambda tensors: {front * 3 + key: value for key, value in tensors.items()})
    load_adapter(llama(), saved)
    edit_weights(saved, lambda tensors: {front * 5000 + "x": next(iter(tensors.values()))})
    with pytest.raises(ValueError, match="with no place in the model"):
        load_adapter(llama(), saved)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_tensor_that_is_not_finite_is_named(llama, saved, value):
    key = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    edit_weights(saved, lambda t: t | {key: t[key].index_fill(0, torch.tensor(3), value)})
    refused(llama(), saved, f"NaN or inf in {key}")


def write_header(folder: Path, header: dict | bytes, size: int) -> None:
    """A weights file with this header and `size` bytes of holes after it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    with open(folder / WEIGHTS, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + size)


def test_a_huge_tensor_is_refused_from_the_header_alone(llama, saved, monkeypatch):
    monkeypatch.setattr(safetensors, "safe_open", lambda *a, **k: pytest.fail("the tensors were opened"))
    key, n = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", 1 << 36
    entry = {"dtype": "F32", "shape": [1 << 18, 1 << 18], "data_offsets": [0, 4 * n]}
    write_header(saved, {key: entry}, 4 * n)  # 256 GB of holes
    refused(llama(), saved, r"must be \(4, 64\), got \(262144, 262144\)")


@pytest.mark.parametrize(
    ("header", "size", "message"),
    [
        (b"nonsense", 0, "the header is broken"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, 4, "4 bytes do not hold shape"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, 9, "the file has"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, 8, "overlap or leave a gap"),
        ({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}, 0, "are no sizes"),
        ({"a": {"dtype": "I8", "shape": [1], "data_offsets": [0, 1]}}, 1, "dtype must be one of"),
        ({"a": 3}, 0, "the header is broken"),
        ({"__metadata__": {"peft_engine": "{"}}, 0, "the metadata .* is broken"),
    ],
)
def test_a_header_that_lies_is_refused(llama, saved, header, size, message):
    write_header(saved, header, size)
    refused(llama(), saved, message)


def test_a_file_cut_short_or_with_flipped_bits_never_loads_wrong_shapes(llama, saved):
    good = (saved / WEIGHTS).read_bytes()
    model = llama()
    generator = torch.Generator().manual_seed(0)
    length = int.from_bytes(good[:8], "little")
    for cut in (0, 3, 8, 20, length, len(good) - 1):
        (saved / WEIGHTS).write_bytes(good[:cut])
        refused(model, saved, "no safetensors file|header")
    for _ in range(60):
        at = int(torch.randint(8 + length, (1,), generator=generator))
        data = bytearray(good)
        data[at] ^= 1 << int(torch.randint(8, (1,), generator=generator))
        (saved / WEIGHTS).write_bytes(data)
        try:
            load_adapter(model, saved)
        except ValueError:
            continue
        detach(model)


def test_an_adapter_for_another_base_is_named(llama, saved):
    edit_config(saved, base_model_name_or_path="movies/llama-tiny")
    other = "the adapter is for base 'movies/llama-tiny', this model is"
    refused(llama(hidden_size=32), saved, f"{other}.*of another shape")
    refused(llama(num_hidden_layers=3), saved, f"{other}.*missing")
    refused(llama(seed=5), saved, f"{other}.*weights of this model differ")
    refused(nn.Sequential(nn.Linear(3, 3)), saved, f"{other} None.*match no module")
    assert load_adapter(llama(seed=5), saved, any_base=True) == "default"


def test_the_base_is_known_whatever_torchs_default_dtype_is(llama, tmp_path):
    """In bfloat16 the last row, 1023, would be 1024."""
    model = shake(attach(llama(vocab_size=1024), LoraConfig(r=2)))
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        saved = save_adapter(model, tmp_path / "adapter")
    finally:
        torch.set_default_dtype(before)
    assert load_adapter(llama(vocab_size=1024), saved) == "default"


@pytest.mark.parametrize("low", range(0, 256, 8))
def test_a_header_of_any_length_is_read(tmp_path, low):
    """safetensors begin with the header's length, a multiple of 8; 0x80 is also a pickle's first byte."""
    path = tmp_path / "adapter_model.safetensors"
    safetensors.torch.save_file({"a": torch.ones(2)}, path, {"name": "x" * 256})
    length = int.from_bytes(path.read_bytes()[:8], "little")
    more = (low - length) % 256
    safetensors.torch.save_file({"a": torch.ones(2)}, path, {"name": "x" * (256 + more)})
    assert path.read_bytes()[0] == low
    assert read_header(path)[0] == {"a": (2,)}


def test_an_adapter_that_a_resize_took_off_the_head_is_not_saved(llama, tmp_path):
    model = shake(attach(llama(), LoraConfig(r=4, target_modules=["q_proj", "lm_head"])))
    model.resize_token_embeddings(model.config.vocab_size + 8)
    with pytest.raises(ValueError, match=r"lm_head\.lora_A\.weight is gone with its module.*before attach"):
        save_adapter(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_copies_that_a_resize_left_behind_are_not_saved(llama, tmp_path):
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    model = shake(attach(llama(), config))
    rows = model.config.vocab_size
    model.resize_token_embeddings(rows + 8)
    with pytest.raises(
        ValueError, match=r"adapter 'default'.*lm_head\.weight has none.*before attach"
    ) as error:
        save_adapter(model, tmp_path / "out")
    assert f"embed_tokens.weight must be ({rows}, 64) like the base's, got ({rows + 8}, 64)" in str(
        error.value
    )
    assert not (tmp_path / "out").exists()
    model = llama()
    model.resize_token_embeddings(rows + 8)
    save_adapter(shake(attach(model, config)), tmp_path / "out")
