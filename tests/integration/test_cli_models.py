"""Which models and bases the command takes, and what it says of the others."""

import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from texts import reviews, tiny_tokenizer, write_jsonl

import peft_engine as pe
from peft_engine.train.models import load_base

SIZES = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "vocab_size": 320, "max_position_embeddings": 128,
}  # fmt: skip


@pytest.fixture
def data(tmp_path):
    return write_jsonl(tmp_path / "rows.jsonl", reviews())


def saved(made, folder):
    made.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def refused(command, data, tmp_path):
    """What each command that loads a model says of one that it does not take."""

    def run(folder, *more):
        said = set()
        for line in (
            ("train", "--method", "lora", "--output", tmp_path / "out"),
            ("eval",),
            ("generate", "--prompt", "a", "--max-new-tokens", 2),
        ):
            of = () if line[0] == "generate" else ("--data", data)
            code, out, err = command(*line, "--model", folder, *of, *more)
            assert code == 1 and out == "" and "Traceback" not in err, err
            said.add(err.strip().splitlines()[-1].removeprefix(f"peft-engine: error: --model {folder}: "))
        assert len(said) == 1 and not (tmp_path / "out").exists()
        return said.pop()

    return run


def test_a_decoder_behind_an_encoder_of_sound_is_refused(refused, tmp_path):
    config = transformers.WhisperConfig(
        d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        vocab_size=320, pad_token_id=0,
    )  # fmt: skip
    folder = saved(transformers.WhisperForConditionalGeneration(config), tmp_path / "whisper")
    assert "its encoder reads no text" in refused(folder)


@pytest.mark.parametrize("quantize", ["nf4", "none"])
def test_a_base_is_frozen(tmp_path, quantize):
    """Weights that would be trained have torch's products in float32, also where nothing is trained."""
    made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    model = load_base(str(saved(made, tmp_path / "model")), quantize=quantize)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("quantize", ["nf4", "none"])
def test_a_decoder_without_a_token_to_start_from_is_refused(refused, tmp_path, quantize):
    config = transformers.T5Config(d_model=64, d_kv=32, d_ff=64, num_layers=2, num_heads=2, vocab_size=320)
    folder = saved(transformers.T5ForConditionalGeneration(config), tmp_path / "t5")
    assert "config.json has no decoder_start_token_id" in refused(folder, "--quantize", quantize)


@pytest.mark.parametrize("quantize", ["nf4", "none"])
def test_an_encoder_is_refused_although_a_class_makes_a_language_model_of_it(refused, tmp_path, quantize):
    made = transformers.RobertaForMaskedLM(transformers.RobertaConfig(**SIZES))
    says = refused(saved(made, tmp_path / "roberta"), "--quantize", quantize)
    assert "sees those behind it, as in an encoder" in says


@pytest.mark.parametrize("quantize", ["nf4", "none"])
def test_a_classifier_is_refused_and_no_head_is_made_up(refused, tmp_path, quantize):
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, pad_token_id=0)
    folder = saved(transformers.LlamaForSequenceClassification(config), tmp_path / "classifier")
    says = refused(folder, "--quantize", quantize)
    assert (
        says.startswith("the checkpoint has no lm_head.weight")
        if quantize == "none"
        else "no logits for each token" in says
    )


def test_a_pickle_that_holds_more_than_tensors_is_not_read(refused, model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "pickled")
    (folder / "model.safetensors").unlink()
    torch.save({"a": shutil.rmtree}, folder / "pytorch_model.bin")
    says = refused(folder)
    assert "a pickle with more in it than tensors" in says and "weights_only" not in says


def test_a_folder_without_a_tokenizer_is_told_with_what_saves_it(refused, model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    assert refused(folder) == "the folder holds no tokenizer; save it there: tokenizer.save_pretrained(...)"


def test_weights_that_the_model_has_no_place_for_are_told(command, model, data, tmp_path):
    folder = shutil.copytree(model, tmp_path / "more")
    tensors = load_file(folder / "model.safetensors")
    tensors["value_head.weight"] = tensors["model.norm.weight"].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    code, _, err = command("eval", "--model", folder, "--data", data, "--quantize", "none")
    assert code == 0 and "Not read: value_head.weight, which LlamaForCausalLM has no place for" in err


@pytest.mark.parametrize("config", [pe.LoraConfig(r=2), pe.BottleneckConfig(reduction_factor=8)])
@pytest.mark.parametrize("packed", [True, False])
def test_an_adapter_without_a_record_says_itself_which_base_it_is_for(
    command, model, data, tmp_path, config, packed
):
    made = transformers.AutoModelForCausalLM.from_pretrained(model)
    if packed:
        pe.quantize_(made)
    pe.attach(made, config)
    for parameter in made.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.02)
    folder = pe.save_adapter(made, tmp_path / "adapter")
    line = ("eval", "--model", model, "--data", data, "--adapter", folder)
    code, _, err = command(*line)
    assert code == 0 and ("in NF4" if packed else "dense") in err, err
    assert "dense" in command(*line, "--quantize", "none")[2]


def test_a_token_that_the_tokenizer_alone_was_given_is_refused_by_name(command, model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "added")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.add_tokens(["<yes>"])
    tokenizer.save_pretrained(folder)
    plain = write_jsonl(tmp_path / "plain.jsonl", reviews())
    with_it = write_jsonl(tmp_path / "with.jsonl", [{"prompt": "a", "completion": " <yes>"}] * 2)
    line = ("--model", folder, "--data")
    train = ("train", *line, plain, "--max-steps", 1, "--output", tmp_path / "adapter")
    assert command(*train)[0] == 0  # it may be there, unused
    for words in (
        ("train", *line, with_it, "--output", tmp_path / "out"),
        ("eval", *line, with_it, "--task", "classify"),
        ("eval", *line, with_it, "--task", "generate"),
        ("merge", *line, with_it, "--adapter", tmp_path / "adapter", "--output", tmp_path / "merged"),
        ("generate", "--model", folder, "--prompt", "a <yes>", "--max-new-tokens", 2),
    ):
        code, _, err = command(*words)
        assert code == 1 and "error: the token '<yes>' has the number" in err, err


def test_a_tilde_behind_the_sign_is_the_home_folder(command, model, data, monkeypatch):
    monkeypatch.setenv("HOME", str(model.parent))
    code, _, err = command("eval", f"--model=~/{model.name}", "--data", data)
    assert code == 0 and f"Loading {model}, " in err


def test_gpt2_trains_in_nf4_goes_on_from_a_checkpoint_and_is_merged(command, data, tmp_path):
    config = transformers.GPT2Config(
        n_embd=64, n_layer=2, n_head=4, vocab_size=320, n_positions=128, bos_token_id=0, eos_token_id=0
    )
    torch.manual_seed(0)
    folder = saved(transformers.GPT2LMHeadModel(config), tmp_path / "gpt2")
    line = (
        "train",
        "--model",
        folder,
        "--data",
        data,
        "--method",
        "qlora",
        "--epochs",
        "2",
        "--save-steps",
        "1",
    )
    code, _, err = command(*line, "--output", tmp_path / "whole")
    assert code == 0, err
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    states = sorted((tmp_path / "cut").glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]))
    for state in states[1:]:
        shutil.rmtree(state)
    code, _, err = command(*line, "--output", tmp_path / "cut", "--resume")
    assert code == 0, err
    whole, cut = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "cut"))
    assert whole.keys() == cut.keys() and all(torch.equal(t, cut[key]) for key, t in whole.items())
    code, _, err = command(
        "merge", "--model", folder, "--adapter", tmp_path / "whole", "--output", tmp_path / "merged"
    )
    assert code == 0, err
    transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "merged")
