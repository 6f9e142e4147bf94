"""`peft-engine merge` as a user types it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import SafetensorError
from texts import reviews, write_jsonl

import peft_engine as pe
from peft_engine import adapter_files
from peft_engine.train import merge_command

IDS = torch.arange(12)[None]


def load(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture
def adapter(model, tmp_path):
    """A factory of folders with an adapter that changes the model."""

    def make(base=None, **settings) -> Path:
        torch.manual_seed(0)
        on = load(model) if base is None else base
        config = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False} | settings
        pe.attach(on, pe.LoraConfig(**config))
        return pe.save_adapter(on, tmp_path / "adapter")

    return make


@pytest.mark.parametrize("dora", [False, True])
def test_the_merged_folder_is_a_model_that_computes_the_same(command, model, adapter, tmp_path, dora):
    folder, out_folder = adapter(use_dora=dora), tmp_path / "new" / "merged"
    code, out, err = command("merge", "--model", model, "--adapter", folder, "--output", out_folder, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found.keys() == {"output", "base", "adapter", "layers", "bytes", "drift", "seconds"}
    assert found["layers"] == 14 and found["output"] == str(out_folder)
    assert found["bytes"] == sum(file.stat().st_size for file in out_folder.iterdir())
    drift = found["drift"]
    assert drift["tokens"] > 40 and drift["same"] == 1.0 and drift["kl"] < 1e-6 and drift["largest"] < 1e-3
    assert "Merging 28/28" in err and "Drift on" in err and "Next: peft-engine generate" in err
    expected = load(model)
    pe.load_adapter(expected, folder)
    torch.testing.assert_close(load(out_folder)(IDS).logits, expected(IDS).logits, rtol=1e-4, atol=1e-4)
    transformers.AutoTokenizer.from_pretrained(out_folder)
    assert [entry.name for entry in out_folder.parent.iterdir()] == ["merged"]


def test_what_a_model_contains_is_not_put_on_it_again(command, model, adapter, tmp_path):
    first = adapter()
    merged, again = tmp_path / "merged", tmp_path / "again"
    assert command("merge", "--model", model, "--adapter", first, "--output", merged)[0] == 0
    for line in (("merge", "--output", again), ("generate", "--prompt", "a", "--max-new-tokens", 2)):
        code, _, err = command(*line, "--model", merged, "--adapter", first)
        assert code == 1 and "was merged into the weights of" in err and "leave it out" in err
    second = pe.attach(load(merged), pe.LoraConfig(r=2, init_lora_weights=False))
    other = pe.save_adapter(second, tmp_path / "other")
    code, _, err = command("merge", "--model", merged, "--adapter", other, "--output", again)
    assert code == 0, err
    assert len(json.loads((again / "config.json").read_text())["peft_engine_merged"]) == 2


@pytest.mark.parametrize("requantize", [False, True])
def test_a_4_bit_base_becomes_dense_unless_told_otherwise(command, model, adapter, tmp_path, requantize):
    folder = adapter(pe.load_quantized(model))
    data = write_jsonl(tmp_path / "rows.jsonl", reviews())
    line = ["merge", "--model", model, "--adapter", folder, "--output", tmp_path / "merged", "--data", data]
    code, out, err = command(*line, "--quantize", "nf4", "--json", *(["--requantize"] if requantize else []))
    assert code == 0, err
    merged = load(tmp_path / "merged") if not requantize else pe.load_quantized(tmp_path / "merged")
    kinds = {type(m) for m in merged.modules() if isinstance(m, torch.nn.Linear)}
    assert (pe.nn.NF4Linear in kinds) is requantize
    expected = pe.load_quantized(model).eval()
    pe.load_adapter(expected, folder)
    error = (merged(IDS).logits - expected(IDS).logits).abs().max()
    drift = json.loads(out)["drift"]
    assert (error < 1e-3) is not requantize  # what 4 bit cost is there, and is told
    assert (drift["kl"] < 1e-6) is not requantize and drift["kl"] >= 0
    more = ("--model", tmp_path / "merged", "--data", data, "--method", "lora", "--max-steps", 1)
    code, _, err = command("train", *more, "--output", tmp_path / "out")
    assert code == requantize and ("take --quantize nf4" in err) is requantize


def test_the_drift_is_that_of_the_distributions():
    p = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]])
    q = torch.tensor([[0.25, 0.5, 0.25], [0.1, 0.8, 0.1]])
    found = merge_command._drift([p.log()], [q.log()])
    kl = (0.5 * torch.tensor(2.0).log() + 0.25 * torch.tensor(0.5).log()) / 2
    assert found["tokens"] == 2 and found["same"] == 0.5
    assert found["kl"] == pytest.approx(kl.item(), rel=1e-5)
    assert found["largest"] == pytest.approx(torch.tensor(2.0).log().item(), rel=1e-5)


def test_rows_of_any_length_are_measured_on_their_beginnings(command, model, adapter, tmp_path, monkeypatch):
    rows = [{"prompt": "fine " * 300, "completion": " positive"}, *reviews()]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    plain = shutil.copytree(model, tmp_path / "model")
    settings = json.loads((plain / "tokenizer_config.json").read_text())
    settings["eos_token"] = None  # nothing is learnt here
    (plain / "tokenizer_config.json").write_text(json.dumps(settings))
    line = ("merge", "--model", plain, "--adapter", adapter(), "--data", data, "--json", "--output")
    code, out, err = command(*line, tmp_path / "whole")
    assert code == 0, err
    whole = json.loads(out)["drift"]
    assert whole["tokens"] > 128 + 8 * 10 and f"Drift on {whole['tokens']} tokens" in err
    monkeypatch.setattr(merge_command, "HELD", 150 * 320 * 4)
    assert json.loads(command(*line, tmp_path / "part")[1])["drift"]["tokens"] == 150


def test_the_drift_of_many_documents_is_that_of_all_their_places(monkeypatch):
    before, after = torch.randn(2, 300, 7).unbind()
    monkeypatch.setattr(merge_command, "PLACES", 64)
    found = merge_command._drift(before.split((100, 1, 199)), iter(after.split((100, 1, 199))))
    p, q = before.double().log_softmax(-1), after.double().log_softmax(-1)
    change = (p - q).gather(1, p.argmax(-1)[:, None]).abs().max()
    assert found["tokens"] == 300
    assert found["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-5)
    assert found["largest"] == pytest.approx(float(change), rel=1e-5)
    assert found["same"] == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    after[0, 0] = float("nan")
    found = merge_command._drift([before], [after])
    assert found["kl"] != found["kl"] and found["largest"] != found["largest"]


def test_what_is_there_is_not_replaced(command, model, adapter, tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").write_text("x")
    for there in (full, full / "mine"):
        code, out, err = command("merge", "--model", model, "--adapter", adapter(), "--output", there)
        assert code == 1 and out == "" and "there is something already; give a new folder" in err
        shutil.rmtree(tmp_path / "adapter")
    assert (full / "mine").read_text() == "x"
    empty = tmp_path / "empty"
    empty.mkdir()
    code, _, err = command("merge", "--model", model, "--adapter", adapter(), "--output", empty)
    assert code == 0 and (empty / "config.json").exists(), err


@pytest.mark.parametrize("kind", [OSError, SafetensorError])  # the tokenizer's, and the weights'
def test_a_merge_that_fails_leaves_nothing(command, model, adapter, tmp_path, monkeypatch, kind):
    folder = adapter()

    def full(*arguments, **more):
        raise kind("No space left on device")

    monkeypatch.setattr(transformers.PreTrainedTokenizerBase, "save_pretrained", full)
    code, _, err = command("merge", "--model", model, "--adapter", folder, "--output", tmp_path / "merged")
    says = f"error: merge: --output {tmp_path / 'merged'}: writing failed: No space left on device; nothing"
    assert code == 1 and says in err, err
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["adapter"]


def test_another_base_and_an_adapter_that_is_no_change_of_a_weight_are_refused(command, model, tmp_path):
    other = tmp_path / "other"
    changed = load(model)
    with torch.no_grad():
        changed.get_input_embeddings().weight.mul_(2)
    pe.attach(changed, pe.LoraConfig(target_modules="all-linear", init_lora_weights=False))
    pe.save_adapter(changed, other)
    code, _, err = command("merge", "--model", model, "--adapter", other, "--output", tmp_path / "m")
    assert code == 1 and "the weights of this model differ from the base it was trained on" in err
    assert err.endswith(": give that base as --model\n")  # and no argument of a function
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("kind", ["mount", "link"])
def test_an_empty_folder_that_cannot_be_replaced_is_filled(
    command, model, adapter, tmp_path, monkeypatch, kind
):
    (tmp_path / "disk").mkdir()
    out = tmp_path / "disk"
    if kind == "link":
        out = tmp_path / "link"
        out.symlink_to(tmp_path / "disk")
    else:
        monkeypatch.setattr(adapter_files, "_is_mount", lambda folder: folder == out)
    code, _, err = command("merge", "--model", model, "--adapter", adapter(), "--output", out)
    assert code == 0, err
    assert load(out)(IDS).logits.isfinite().all()
    assert not list(out.glob(".*")) and not list(tmp_path.glob(".*"))
