"""The command over every method: training, the options of each, and rows that name their adapter."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from texts import reviews, write_jsonl

from peft_engine.cli import main
from peft_engine.train.method_options import DEFAULTS, METHODS, MethodOptions, config_of, learning_rate

# What a method takes on a model two layers deep and 64 wide.
OPTIONS = {
    "lora": ("--rank", 4, "--learning-rate", 0.01),
    "qlora": ("--rank", 4, "--learning-rate", 0.01),
    "prefix": ("--virtual-tokens", 6, "--learning-rate", 0.1),
    "prompt": ("--virtual-tokens", 6, "--learning-rate", 0.1),
    "bottleneck": ("--width", 8, "--learning-rate", 0.02),
}


@pytest.fixture
def data(tmp_path) -> Path:
    return write_jsonl(tmp_path / "rows.jsonl", reviews(2))


@pytest.fixture
def train(command, model, data, tmp_path):
    def run(method, *more, output=None):
        return command(
            "train", "--model", model, "--data", data, "--output", output or tmp_path / method,
            "--method", method, "--batch-size", 4, *OPTIONS[method], *more,
        )  # fmt: skip

    return run


@pytest.fixture(scope="module")
def adapters(model, tmp_path_factory) -> dict[str, Path]:
    """An adapter of each method over the dense base, by method, that has learnt to tell the reviews apart."""
    folder = tmp_path_factory.mktemp("adapters")
    data = write_jsonl(folder / "rows.jsonl", reviews(2))
    made = {}
    for method in ("lora", "prefix", "prompt", "bottleneck"):
        made[method] = folder / method
        line = ["train", "--model", model, "--data", data, "--output", made[method], "--method", method]
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
            rest = ["--batch-size", 4, "--epochs", 4, *OPTIONS[method]]
            patch.setattr(sys, "argv", ["peft-engine", *map(str, [*line, *rest])])
            main()
        assert not end.value.code
    return made


# --- train --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantize", ["none", "nf4"])
@pytest.mark.parametrize("method", METHODS)
def test_each_method_learns_over_a_dense_and_a_quantised_base(train, tmp_path, method, quantize):
    if method == "qlora" and quantize == "none":
        pytest.skip("qlora is lora over a base in 4 bit")
    code, _, err = train(method, "--epochs", 4, "--quantize", quantize)
    assert code == 0, err
    folder = tmp_path / method
    record = json.loads((folder / "run.json").read_text())
    assert record["method"] == method and record["settings"]["quantize"] == quantize
    assert record["losses"][-1] < 0.7 * record["losses"][0]
    assert record["without_gradient"] == []
    assert DEFAULTS[method].keys() <= record["settings"].keys()
    others = {name for m in METHODS for name in DEFAULTS[m]} - DEFAULTS[method].keys()
    assert not others & record["settings"].keys()
    tensors = load_file(next(folder.glob("*adapter*.safetensors")))
    assert record["trainable_parameters"] == sum(t.numel() for t in tensors.values())
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "Adapter: " in err and ("in NF4" if quantize == "nf4" else "dense") in err


def test_dora_trains_and_is_used(train, tmp_path, command, model, data):
    code, _, err = train("qlora", "--epochs", 4, "--dora", "--dropout", 0.1)
    assert code == 0 and "Adapter: DoRA, rank 4" in err, err
    record = json.loads((tmp_path / "qlora" / "run.json").read_text())
    assert record["settings"]["dora"] is True and record["without_gradient"] == []
    assert record["losses"][-1] < 0.7 * record["losses"][0]
    code, out, err = command("explain", "--model", model, "--adapter", tmp_path / "qlora", "--json")
    assert code == 0, err
    assert [line for line in json.loads(out)["layers"] if line["op"] == "dora_linear"]


@pytest.mark.parametrize("method", METHODS)
def test_what_is_not_given_is_the_method_s_default_and_stands_in_the_record(method):
    values = MethodOptions().of(method)
    assert values.keys() == DEFAULTS[method].keys()
    assert learning_rate(method) > 0
    made = config_of(method, values, "unused")
    for option, field in (("rank", "r"), ("virtual_tokens", "num_virtual_tokens"), ("dropout", "dropout")):
        if option in values and hasattr(made, field):
            assert getattr(made, field) == values[option]


@pytest.mark.parametrize("method", METHODS)
def test_an_option_of_another_method_is_wrong_usage(train, tmp_path, method):
    samples = {
        "rank": 4, "alpha": 8, "dropout": 0.1, "target_modules": "q_proj", "virtual_tokens": 4,
        "target_parameters": "experts.down_proj", "init": "vocab", "init_text": "a",
        "prefix_projection": None, "dora": None, "width": 8, "reduction_factor": 2, "placement": "houlsby",
        "activation": "gelu",
    }  # fmt: skip
    assert samples.keys() == MethodOptions.__dataclass_fields__.keys()
    for name in samples.keys() - DEFAULTS[method].keys():
        option = f"--{name.replace('_', '-')}"
        code, out, err = train(method, option, *([] if samples[name] is None else [samples[name]]))
        assert code == 2 and out == "", (option, err)
        assert f"{option}: {method} has no such option, it belongs to" in " ".join(err.split())
    assert not (tmp_path / method).exists()


@pytest.mark.parametrize(
    ("method", "arguments", "says"),
    [
        ("prefix", ("--virtual-tokens", 0), "--virtual-tokens: expected at least 1"),
        ("prompt", ("--init", "zero"), "--init: expected one of random, vocab, text"),
        ("prompt", ("--init", "text"), "--init-text beside --init text"),
        ("prompt", ("--init", "vocab", "--init-text", "a"), "--init text beside it"),
        ("prompt", ("--init-text", "a\udce9"), "--init-text: the text holds '\\udce9'"),
        ("prefix", ("--prefix-projection", "--init", "vocab"), "an MLP makes the prefix"),
        ("lora", ("--rank", 10**20), "--rank: expected at least 1, below 2^31, got 1000"),
        ("lora", ("--alpha", 1e300), "--alpha: expected a number above 0, below 2^127, got 1e+300"),
        (
            "lora",
            ("--target-parameters", "a", "--dora"),
            "--target-parameters: expected neither --dropout nor",
        ),
        ("lora", ("--dropout", "nan"), "--dropout: expected a number from 0 up to 1, got nan"),
        ("bottleneck", ("--width", 10**20), "--width: expected at least 1, below 2^31, got 1000"),
        ("bottleneck", ("--reduction-factor", 4), "no --reduction-factor beside it"),
        ("bottleneck", ("--placement", "here"), "--placement: expected one of houlsby"),
        ("bottleneck", ("--activation", "sine"), "--activation: expected one of relu"),
        ("qlora", ("--quantize", "none"), "nf4 with qlora"),
    ],
)
def test_options_that_cannot_be_are_wrong_usage(train, method, arguments, says):
    code, out, err = train(method, *arguments)
    assert code == 2 and out == "" and says in " ".join(err.replace("│", " ").split())


def test_virtual_tokens_take_positions_of_the_model_from_the_rows(train, data):
    row = {"prompt": "fine " * 50, "completion": " positive"}
    data.write_text(data.read_text() + json.dumps(row) + "\n")
    code, _, err = train("prefix", "--virtual-tokens", 100)
    assert code == 1 and "line 17" in err and "at most 28 are allowed" in err
    code, _, err = train("prefix", "--virtual-tokens", 127)
    assert code == 1 and "--virtual-tokens: the model has 128 positions" in err
    code, _, err = train("prefix", "--virtual-tokens", 100, "--max-length", 60)
    assert code == 1 and "the model takes 28 tokens beside 100 virtual ones" in err


@pytest.mark.parametrize("method", ["prefix", "prompt", "bottleneck"])
def test_a_run_that_was_cut_resumes_to_the_same_adapter(train, tmp_path, method):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    steps = ("--max-steps", 4, "--save-steps", 2)
    assert train(method, *steps, output=whole)[0] == 0
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoint-4")
    code, _, err = train(method, *steps, "--resume", output=cut)
    assert code == 0 and "checkpoint-2" in err, err
    file = next(whole.glob("*adapter*.safetensors")).name
    assert (whole / file).read_bytes() == (cut / file).read_bytes()
    assert json.loads((cut / "run.json").read_text())["resumed_from_step"] == 2


def test_a_prefix_made_by_an_mlp_trains_and_cannot_be_resumed(train, tmp_path):
    code, _, err = train("prefix", "--prefix-projection", "--epochs", 2, "--learning-rate", 0.01)
    assert code == 0, err
    record = json.loads((tmp_path / "prefix" / "run.json").read_text())
    assert record["settings"]["init"] == "random" and record["losses"][-1] < record["losses"][0]
    stored = load_file(tmp_path / "prefix" / "adapter_model.safetensors")
    assert record["trainable_parameters"] > sum(t.numel() for t in stored.values())
    for more in ((), ("--prefix-projection",)):
        code, out, err = train("prefix", *more, "--resume", "--learning-rate", 0.01)
        assert code == 1 and out == "" and "without the MLP" in err.strip().splitlines()[-1]


def test_a_prompt_starts_from_the_text_it_is_given(train, tmp_path):
    code, _, err = train("prompt", "--init-text", "a fine film", "--max-steps", 1, "--learning-rate", 1e-9)
    assert code == 0, err
    assert "from 'a fine film'" in err
    record = json.loads((tmp_path / "prompt" / "run.json").read_text())
    assert record["settings"]["init"] == "text" and record["settings"]["init_text"] == "a fine film"
    rows = load_file(tmp_path / "prompt" / "adapter_model.safetensors")["prompt_embeddings"]
    import transformers

    folder = record["settings"]["model"]
    ids = transformers.AutoTokenizer.from_pretrained(folder)("a fine film")["input_ids"]
    table = transformers.AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings().weight
    wanted = table[[ids[i % len(ids)] for i in range(6)]]
    assert (rows - wanted).abs().max() < 1e-6


# --- eval and generate --------------------------------------------------------------------------------------


def test_eval_measures_adapters_of_any_method(command, model, adapters, data):
    folders = [part for folder in adapters.values() for part in ("--adapter", folder)]
    code, out, err = command("eval", "--model", model, *folders, "--data", data, "--json")
    assert code == 0, err
    results = json.loads(out)["results"]
    assert [r["adapter"] for r in results] == [str(folder) for folder in adapters.values()]
    for result, folder in zip(results, adapters.values(), strict=True):
        line = ("eval", "--model", model, "--data", data, "--adapter", folder, "--task", "generate", "--json")
        alone = json.loads(command(*line)[1])
        base = json.loads(command(*line[:5], *line[7:])[1])
        assert alone["perplexity"] < base["perplexity"], folder
        one = json.loads(command(*line[:7], "--json")[1])
        assert result["confusion"] == one["confusion"], folder


def test_rows_of_one_file_are_answered_by_the_adapters_they_name(command, model, adapters, tmp_path):
    prompts = [row["prompt"] for row in reviews()[2:6]]
    named: list = [None, *adapters]
    rows = [
        {"prompt": prompt} | ({} if name is None else {"adapter": name})
        for prompt in prompts
        for name in named
    ]
    rows[0]["adapter"], rows[1]["adapter"] = "", str(adapters["lora"])  # empty: the base; a whole path
    mixed = write_jsonl(tmp_path / "mixed.jsonl", rows)
    folders = [part for folder in adapters.values() for part in ("--adapter", folder)]
    line = ("generate", "--model", model, "--max-new-tokens", 6, "--json", "--prompt-file")
    code, out, err = command(*line, mixed, *folders, "--batch-size", len(rows))
    assert code == 0, err
    got = json.loads(out)["results"]
    assert [r["adapter"] for r in got] == [n and str(adapters[n]) for _ in prompts for n in named]
    plain = write_jsonl(tmp_path / "plain.jsonl", [{"prompt": prompt} for prompt in prompts])
    for i, name in enumerate(named):
        alone = json.loads(command(*line, plain, *(("--adapter", adapters[name]) if name else ()))[1])[
            "results"
        ]
        assert [r["text"] for r in got[i :: len(named)]] == [r["text"] for r in alone], name
    assert len({r["text"] for r in got}) > 1
    _, out, _ = command(*line[:-2], "--prompt-file", mixed, *folders)
    assert "[the base]" in out and f"[{adapters['prefix']}]" in out


@pytest.mark.parametrize(
    ("names", "given", "says"),
    [
        (["tweets"], ["lora"], "line 1: no adapter 'tweets' is given; given: "),
        ([None, "prefix"], ["lora", "prompt"], "line 2: no adapter 'prefix' is given"),
        (["lora"], [], "given: none; add --adapter"),
        ([3], ["lora"], "adapter must be the name of a folder"),
    ],
)
def test_a_row_that_names_another_adapter_is_refused(command, model, adapters, tmp_path, names, given, says):
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a", "adapter": name} for name in names])
    folders = [part for name in given for part in ("--adapter", adapters[name])]
    code, out, err = command("generate", "--model", model, "--prompt-file", rows, *folders)
    assert code == (1 if names == [3] else 2) and out == "" and "Traceback" not in err
    assert says in " ".join(err.replace("│", " ").split())


def test_two_adapters_of_one_name_must_be_told_apart_by_their_paths(command, model, adapters, tmp_path):
    twin = shutil.copytree(adapters["lora"], tmp_path / "twin" / "lora")
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a", "adapter": "lora"}])
    line = ("generate", "--model", model, "--prompt-file", rows, "--adapter", adapters["lora"])
    code, out, err = command(*line, "--adapter", twin)
    assert code == 2 and out == "" and "several of those given" in " ".join(err.replace("│", " ").split())


def test_a_prompt_that_the_virtual_tokens_leave_no_room_for_is_refused(command, model, adapters):
    line = ("generate", "--model", model, "--prompt", "a", "--adapter", adapters["prompt"])
    code, out, err = command(*line, "--max-new-tokens", 122)
    assert code == 1 and out == "" and "exceed the model's 122" in err
