"""Adapters on disk: PEFT's format both ways, every key landing, and nothing lost when a write fails."""

import errno
import json
import os
import resource
import warnings

import pytest
import safetensors
import safetensors.torch
import torch
import transformers
from method_cases import ALL, IDS, edit_weights, refused, shake
from torch import nn

import peft_engine as pe
from peft_engine import adapter_files
from peft_engine.checkpoint import CONFIG, WEIGHTS, load_adapter, save_adapter
from peft_engine.methods import LoraConfig, attach
from peft_engine.methods.attach import tensors

# --- both ways ----------------------------------------------------------------------------------------------

SETTINGS = [
    dict(target_modules="all-linear"),
    dict(),
    dict(target_modules=["q_proj", "v_proj"], bias="all"),
    dict(target_modules="all-linear", bias="lora_only"),
    dict(target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"]),
    dict(target_modules=["q_proj"], bias="all", modules_to_save=["o_proj"]),
    dict(target_modules=["up_proj"], bias="all", modules_to_save=["self_attn"]),
    dict(target_modules=["lm_head", "q_proj"]),
    dict(
        target_modules=r".*\.(q|up)_proj",
        rank_pattern={"up_proj": 3},
        alpha_pattern={r"0\.self_attn\.q_proj": 7},
        use_rslora=True,
    ),
    dict(target_modules="all-linear", use_dora=True, bias="lora_only"),
    dict(target_modules=["q_proj", "up_proj"], layers_to_transform=[1], layers_pattern="layers"),
    dict(target_modules="all-linear", exclude_modules=["up_proj"], lora_dropout=0.1, task_type="CAUSAL_LM"),
]


@pytest.mark.peers
@pytest.mark.parametrize("settings", SETTINGS)
def test_peft_reads_what_we_save_and_we_read_what_peft_saves(llama, tmp_path, settings):
    peft = pytest.importorskip("peft", reason="PEFT is not installed (the peers extra)")
    config = LoraConfig(r=4, lora_alpha=12, **settings)
    model = shake(attach(llama(attention_bias=True), config))
    ours = save_adapter(model, tmp_path / "ours")
    logits = model(IDS).logits

    assert json.loads((ours / CONFIG).read_text())["inference_mode"] is True
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        theirs = peft.PeftModel.from_pretrained(llama(attention_bias=True), ours).eval()
    torch.testing.assert_close(theirs(IDS).logits, logits, rtol=1e-5, atol=1e-5)
    expected = peft.get_peft_model_state_dict(theirs)
    stored = safetensors.torch.load_file(ours / WEIGHTS)
    if not config.modules_to_save and "lm_head" not in (
        config.target_modules or ()
    ):  # PEFT adds base weights
        assert stored.keys() == expected.keys()

    theirs.save_pretrained(tmp_path / "theirs")
    again = llama(attention_bias=True)
    assert load_adapter(again, tmp_path / "theirs") == "default"
    assert torch.equal(again(IDS).logits, logits)
    for path, tensor in tensors(model, "default").items():
        assert torch.equal(tensor, tensors(again, "default")[path])


@pytest.mark.peers
def test_a_classifier_and_its_head_go_both_ways(tmp_path):
    peft = pytest.importorskip("peft", reason="PEFT is not installed (the peers extra)")
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=32,
        num_labels=3,
        pad_token_id=0,
    )

    def classifier():
        torch.manual_seed(0)
        return transformers.LlamaForSequenceClassification(config).eval()

    model = attach(classifier(), LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS"))
    assert {path for path in tensors(model, "default") if "lora_" not in path} == {"score.weight"}
    shake(model)
    ours = save_adapter(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(classifier(), ours).eval()
    torch.testing.assert_close(theirs(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    again = classifier()
    load_adapter(again, tmp_path / "theirs")
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def distilbert():
    torch.manual_seed(0)
    sizes = dict(dim=32, n_layers=1, n_heads=4, hidden_dim=48, vocab_size=32)
    return transformers.DistilBertForSequenceClassification(transformers.DistilBertConfig(**sizes)).eval()


def test_a_module_that_a_heads_name_ends_is_trained_whole_and_not_adapted_too(tmp_path):
    """As in PEFT, "classifier" names pre_classifier as well, which all-linear then leaves alone."""
    config = LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS")
    model = shake(attach(distilbert(), config))
    trained = {path for path in tensors(model, "default") if "classifier" in path}
    assert trained == {f"{which}classifier.{leaf}" for which in ("", "pre_") for leaf in ("weight", "bias")}
    model(IDS, labels=torch.zeros(len(IDS), dtype=torch.long)).loss.backward()
    again = distilbert()
    load_adapter(again, save_adapter(model, tmp_path))
    assert torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.mark.peers
@pytest.mark.parametrize("targets", [["q_lin"], "all-linear"])
def test_distilberts_two_classifiers_go_both_ways(tmp_path, targets):
    peft = pytest.importorskip("peft", reason="PEFT is not installed (the peers extra)")
    model = shake(attach(distilbert(), LoraConfig(r=2, target_modules=targets, task_type="SEQ_CLS")))
    theirs = peft.PeftModel.from_pretrained(distilbert(), save_adapter(model, tmp_path / "ours")).eval()
    torch.testing.assert_close(theirs(IDS).logits, model(IDS).logits)
    theirs.save_pretrained(tmp_path / "theirs")
    again = distilbert()
    load_adapter(again, tmp_path / "theirs")
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_a_base_weight_in_the_file_must_be_the_models(llama, saved):
    base = llama()
    key = "base_model.model.lm_head.weight"
    edit_weights(saved, lambda t: t | {key: base.lm_head.weight.detach()})
    load_adapter(llama(), saved)
    edit_weights(saved, lambda t: t | {key: t[key] + 1})
    refused(llama(), saved, f"{key} is a weight of the base, and this model's differs")


@pytest.mark.peers
def test_an_adapter_of_an_nf4_model_loads_onto_the_dense_one_and_back(llama, tmp_path):
    peft = pytest.importorskip("peft", reason="PEFT is not installed (the peers extra)")
    model = shake(attach(llama(nf4=True), ALL))
    folder = save_adapter(model, tmp_path / "a")
    dense = llama()
    load_adapter(dense, folder)
    theirs = peft.PeftModel.from_pretrained(llama(), folder)
    torch.testing.assert_close(dense(IDS).logits, theirs(IDS).logits, rtol=1e-5, atol=1e-5)
    back = llama(nf4=True)
    load_adapter(back, save_adapter(dense, tmp_path / "b"))
    assert torch.equal(back(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_adapter_loads_onto_the_same_base_in_another_dtype(llama, saved, dtype):
    model = llama().to(dtype)
    load_adapter(model, saved)
    assert all(t.dtype == torch.float32 for t in tensors(model, "default").values())


def test_a_loaded_adapter_is_active_and_saves_to_the_same_bytes(llama, saved, tmp_path):
    model = llama()
    assert load_adapter(model, saved) == "default"
    assert model.peft_engine_active == "default"
    again = save_adapter(model, tmp_path / "again")
    assert (again / WEIGHTS).read_bytes() == (saved / WEIGHTS).read_bytes()
    assert (again / CONFIG).read_bytes() == (saved / CONFIG).read_bytes()


def test_the_name_is_the_one_given_or_the_one_it_was_saved_under(llama, tmp_path):
    model = shake(attach(llama(), ALL, "movies"), "movies")
    folder = save_adapter(model, tmp_path / "a", name="movies")
    fresh = llama()
    assert load_adapter(fresh, folder) == "movies"
    assert load_adapter(fresh, folder, name="tweets") == "tweets"
    assert list(fresh.peft_engine_adapters) == ["movies", "tweets"]
    with pytest.raises(ValueError, match="'movies' is attached already"):
        load_adapter(fresh, folder)


def test_wrappers_leave_no_trace_in_the_keys_and_are_seen_through(llama, saved):
    plain = safetensors.torch.load_file(saved / WEIGHTS)
    inner = llama()
    compiled = torch.compile(nn.DataParallel(inner))
    load_adapter(compiled, saved)
    save_adapter(compiled, saved)
    assert safetensors.torch.load_file(saved / WEIGHTS).keys() == plain.keys()
    for prefix in (
        "",
        "module.",
        "_orig_mod.",
        "base_model.model.module._orig_mod.",
        "module.base_model.model.",
    ):
        edit_weights(
            saved, lambda t, p=prefix: {p + k.split("base_model.model.")[-1]: v for k, v in t.items()}
        )
        load_adapter(llama(), saved)
    edit_weights(saved, lambda t: {k.replace("lora_A.weight", "lora_A.x.weight"): v for k, v in t.items()})
    load_adapter(llama(), saved)


def test_a_layer_compiled_in_place_saves_plain_keys(llama, saved, tmp_path):
    model = llama()
    model.model = torch.compile(model.model)
    load_adapter(model, saved)
    again = save_adapter(model, tmp_path / "again")
    first, second = (safetensors.torch.load_file(folder / WEIGHTS) for folder in (saved, again))
    assert first.keys() == second.keys()


# --- what is refused at save, and what a failed one leaves --------------------------------------------------


def test_an_adapter_that_is_nan_or_untouched_or_absent_is_not_saved(llama, tmp_path):
    model = attach(llama(), ALL)
    with pytest.raises(ValueError, match="untouched by training"):
        save_adapter(model, tmp_path / "a")
    shake(model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.lora_B["default"][2, 1] = float("nan")
    with pytest.raises(ValueError, match=r"NaN or inf in model.layers.1.mlp.up_proj.lora_B.weight"):
        save_adapter(model, tmp_path / "a")
    with pytest.raises(ValueError, match="no adapter 'b' is attached"):
        save_adapter(model, tmp_path / "a", name="b")
    assert not list(tmp_path.iterdir())
    model = attach(llama(), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with pytest.raises(ValueError, match="untouched"):
        save_adapter(model, tmp_path / "a")
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    save_adapter(model, tmp_path / "a")


def test_other_files_in_the_folder_stay(llama, saved):
    (saved / "run.json").write_text("{}")
    (saved / "checkpoint-5").mkdir()
    model = shake(attach(llama(), LoraConfig(r=3, target_modules=["q_proj"])))
    save_adapter(model, saved)
    assert {p.name for p in saved.iterdir()} == {"run.json", "checkpoint-5", CONFIG, WEIGHTS}
    assert [p.name for p in saved.parent.iterdir()] == ["adapter"]
    again = llama()
    load_adapter(again, saved)
    assert again.peft_engine_adapters["default"].r == 3


@pytest.mark.parametrize("crowded", [False, True])
def test_a_full_disk_leaves_the_previous_adapter_whole(llama, saved, crowded):
    if crowded:
        (saved / "run.json").write_text("{}")
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    model = shake(attach(llama(), ALL), seed=2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(OSError, match="untouched") as caught:
            save_adapter(model, saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before
    assert [p.name for p in saved.parent.iterdir()] == ["adapter"]


def test_a_full_disk_leaves_no_folder_where_there_was_none(llama, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        save_adapter(shake(attach(llama(), ALL)), tmp_path / "a" / "b")
    assert not list((tmp_path / "a").iterdir())


@pytest.mark.parametrize(
    ("config", "crowded"), [(ALL, False), (LoraConfig(r=2, target_modules=["q_proj"]), False), (ALL, True)]
)
def test_a_kill_between_any_two_steps_leaves_the_old_or_the_new_adapter(
    llama, tmp_path, config, crowded, monkeypatch
):
    """Each call that reaches the disk is in turn the last that happens."""
    old, new = (shake(attach(llama(), c), seed=s) for s, c in enumerate((ALL, config)))
    contents = [
        {p.name: p.read_bytes() for p in save_adapter(model, tmp_path / kind).iterdir()}
        for kind, model in (("old", old), ("new", new))
    ]
    calls = 0

    def dying(real, at):
        def call(*args):
            nonlocal calls
            calls += 1
            if calls > at:
                raise KeyboardInterrupt
            return real(*args)

        return call

    seen = set()
    for at in range(20):
        folder = save_adapter(old, tmp_path / f"at{at}")
        if crowded:
            (folder / "run.json").write_text("{}")
        calls = 0
        with monkeypatch.context() as patch:
            for name in ("fsync", "rename", "replace", "mkdir"):
                patch.setattr(os, name, dying(getattr(os, name), at))
            patch.setattr(adapter_files, "_exchange", dying(adapter_files._exchange, at))
            patch.setattr(adapter_files.shutil, "rmtree", lambda *a, **k: None)
            try:
                save_adapter(new, folder)
                seen.add("done")
            except KeyboardInterrupt:
                seen.add("killed")
        found = {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "run.json"}
        assert found in contents
        if "done" in seen:
            assert found == contents[1]
            break
    assert seen == {"done", "killed"}


def test_a_process_that_saves_the_same_folder_first_is_followed(llama, tmp_path, monkeypatch):
    """As when every process of a DistributedDataParallel saves."""
    folder, rename, trained = tmp_path / "adapter", os.rename, shake(attach(llama(), ALL))

    def slower(a, b):
        monkeypatch.setattr(os, "rename", rename)
        save_adapter(trained, folder)
        rename(a, b)

    monkeypatch.setattr(os, "rename", slower)
    save_adapter(trained, folder)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}
    assert {path.name for path in folder.iterdir()} == {CONFIG, WEIGHTS}


def test_what_a_killed_save_left_is_cleared_away_an_hour_later(llama, saved):
    old, young = (saved.parent / f".adapter.saving-{kind}" for kind in ("old", "young"))
    for folder in (old, young):
        folder.mkdir()
        (folder / CONFIG).write_text("{}")
    os.utime(old, (0, 0))
    save_adapter(shake(attach(llama(), ALL)), saved)
    assert {p.name for p in saved.parent.iterdir()} == {"adapter", young.name}


def test_a_link_to_the_folder_stays_a_link(llama, saved):
    link = saved.parent / "latest"
    link.symlink_to(saved)
    model = shake(attach(llama(), ALL), seed=2)
    save_adapter(model, link)
    assert link.is_symlink()
    again = llama()
    load_adapter(again, saved)
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_a_file_in_the_folders_place_is_an_error(llama, tmp_path):
    (tmp_path / "a").write_text("mine")
    with pytest.raises(NotADirectoryError, match="is a file"):
        save_adapter(shake(attach(llama(), ALL)), tmp_path / "a")
    assert (tmp_path / "a").read_text() == "mine"


# --- the model's own files ----------------------------------------------------------------------------------


@pytest.mark.parametrize("active", ("default", None))
def test_a_model_with_copies_saves_the_base_under_its_own_names(llama, tmp_path, active):
    model, base = llama(tie_word_embeddings=False), llama(tie_word_embeddings=False)
    shake(attach(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])))
    pe.active(model, active)
    model.save_pretrained(tmp_path)
    plain = type(model).from_pretrained(tmp_path)
    for path, parameter in base.named_parameters():
        assert torch.equal(plain.get_parameter(path), parameter), path


@pytest.mark.parametrize("active", ("default", None))
@pytest.mark.parametrize("nf4", (False, True))
@pytest.mark.parametrize("assign", (False, True))
def test_a_state_dict_with_copies_goes_back_where_it_came_from(llama, active, nf4, assign):
    config = LoraConfig(r=2, target_modules=["q_proj"], bias="all", modules_to_save=["lm_head"])
    settings = {"nf4": nf4, "attention_bias": True, "tie_word_embeddings": False}
    model = shake(attach(llama(**settings), config))
    pe.active(model, active)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    twin = attach(llama(seed=1, **settings), config)
    pe.active(twin, active)
    assert twin.load_state_dict(state, assign=assign) == ([], [])
    assert (twin.lm_head.weight is tensors(twin, "default")["lm_head.weight"]) is (active is not None)
    ids = torch.tensor([[5, 6, 7]])
    for which in ("default", None):
        pe.active(model, which), pe.active(twin, which)
        assert torch.equal(model(ids).logits, twin(ids).logits), which
    # the base's weights alone: the adapter keeps its own
    pe.active(twin, "default")
    mine = twin.lm_head.weight.detach().clone()
    plain = llama(seed=2, **settings)
    twin.load_state_dict(plain.state_dict(), strict=False)
    assert torch.equal(twin.lm_head.weight, mine)
    pe.active(twin, None)
    assert torch.equal(twin(ids).logits, plain(ids).logits)


def test_a_model_without_its_copies_has_no_hook_left(llama):
    model = llama(tie_word_embeddings=False)
    attach(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    pe.detach(model)
    assert not model.lm_head._state_dict_hooks and not model.lm_head._load_state_dict_pre_hooks
    assert not model.lm_head._load_state_dict_post_hooks
