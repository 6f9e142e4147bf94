"""The command over every method: training, the options of each, and rows that name their adapter."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from texts import reviews, tiny_model_folder, write_jsonl

from peft_engine.cli import main
from peft_engine.train.compare import ChildError, Comparison, arguments, methods_of, rates_of, run_command
from peft_engine.train.compare_report import table
from peft_engine.train.method_options import DEFAULTS, METHODS, MethodOptions, config_of, learning_rate
from peft_engine.train.settings import LoopSettings

# What a method takes on a model two layers deep and 64 wide.
OPTIONS = {
    "lora": ("--rank", 4, "--learning-rate", 0.01),
    "qlora": ("--rank", 4, "--learning-rate", 0.01),
    "prefix": ("--virtual-tokens", 6, "--learning-rate", 0.1),
    "prompt": ("--virtual-tokens", 6, "--learning-rate", 0.1),
    "bottleneck": ("--width", 8, "--learning-rate", 0.02),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("model"))


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
        "init": "vocab", "init_text": "a", "prefix_projection": None, "dora": None, "width": 8,
        "reduction_factor": 2, "placement": "houlsby", "activation": "gelu",
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
        ("prefix", ("--prefix-projection", "--init", "vocab"), "an MLP makes the prefix"),
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


# --- compare ------------------------------------------------------------------------------------------------


@pytest.fixture
def compare(command, model, data, tmp_path):
    def run(*more, methods="lora,prefix"):
        return command(
            "compare", "--model", model, "--data", data, "--eval-data", data, "--output", tmp_path / "all",
            "--methods", methods, "--batch-size", 4, *more,
        )  # fmt: skip

    return run


def test_compare_measures_each_method_and_writes_table_csv_and_picture(compare, tmp_path, data):
    line = ("--epochs", 4, "--rank", 4, "--virtual-tokens", 6, "--learning-rate", "lora=0.01")
    code, out, err = compare(*line, "--learning-rate", "prefix=0.1")
    assert code == 0, err
    folder = tmp_path / "all"
    found = json.loads((folder / "compare.json").read_text())
    assert [row["method"] for row in found["rows"]] == ["base", "lora", "prefix"]
    base, *rows = found["rows"]
    assert base["trainable_parameters"] is None and found["eval_data"] == str(data)
    for row in rows:
        record = json.loads((folder / row["method"] / "run.json").read_text())
        for key in ("trainable_parameters", "train_seconds", "peak_rss_bytes", "steps", "settings"):
            assert row[key] == record[key]
        files = [
            folder / row["method"] / name for name in ("adapter_config.json", "adapter_model.safetensors")
        ]
        assert row["file_bytes"] == sum(file.stat().st_size for file in files)
        assert row["steps"] == 16 and row["accuracy"] is not None and row["error"] is None
    assert rows[0]["accuracy"] > base["accuracy"]
    assert rows[0]["settings"]["rank"] == 4 and rows[0]["settings"]["learning_rate"] == 0.01
    assert rows[1]["settings"]["virtual_tokens"] == 6 and rows[1]["settings"]["learning_rate"] == 0.1
    for word in ("base", "lora", "prefix", "accuracy", "trainable parameters", "file size", "peak memory"):
        assert word in out
    assert f"{rows[0]['trainable_parameters']:,}" in out
    with open(folder / "compare.csv", newline="") as file:
        written = list(csv.DictReader(file))
    assert [row["method"] for row in written] == ["base", "lora", "prefix"]
    assert float(written[2]["accuracy"]) == rows[1]["accuracy"]
    assert (folder / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert "Comparing 1/2" in err and "ETA" in err and "  prefix: Training 16/16" in err
    code, out, err = compare()
    assert code == 1 and out == "" and "holds a comparison already" in err


def test_compare_tells_of_a_method_that_fails_and_goes_on(compare, tmp_path, monkeypatch):
    record = {
        "trainable_parameters": 10, "train_seconds": 1.5, "peak_rss_bytes": 2**30,
        "peak_gpu_bytes": None, "steps": 2, "tokens": 9, "losses": [2.0, 1.0], "settings": {},
    }  # fmt: skip

    def child(line, label, say):
        if line[0] == "train" and label == "lora":
            raise ChildError("attach: rank 500 is above the layer's")
        return record if line[0] == "train" else {"accuracy": 0.75, "perplexity": None}

    monkeypatch.setattr("peft_engine.train.compare.run_command", child)
    code, out, err = compare("--max-steps", 2, "--rank", 500, "--json")
    assert code == 1 and "Traceback" not in err
    assert "compare: failed: lora" in err.strip().splitlines()[-1]
    base, lora, prefix = json.loads(out)["rows"]
    assert "rank 500" in lora["error"] and lora["accuracy"] is None and lora["settings"]["rank"] == 500
    assert prefix["error"] is None and prefix["accuracy"] == base["accuracy"] == 0.75
    assert (tmp_path / "all" / "compare.png").exists()
    drawn = table(json.loads(out), 110)
    assert f"lora failed: {lora['error']}" in drawn and "failed" in drawn.splitlines()[4]


def test_the_error_of_a_process_is_its_own_line_and_its_progress_goes_on(tmp_path):
    told: list[str] = []
    with pytest.raises(ChildError) as error:
        run_command(["eval", "--model", "m", "--data", str(tmp_path / "none.jsonl")], "base", told.append)
    assert str(error.value).startswith(f"{tmp_path / 'none.jsonl'}: does not exist")
    with pytest.raises(ChildError, match="exit code 2"):
        run_command(["eval"], "base", told.append)
    assert any("--model" in line and line.startswith("  base: ") for line in told)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--methods", "lora,lra"), "--methods: expected all, or some of lora, qlora"),
        (("--methods", ","), "got nothing"),
        (("--learning-rate", "prompt=1"), "'prompt' is not compared"),
        (("--learning-rate", "fast"), "METHOD=RATE or a number"),
        (("--width", 8), "--width: is an option of bottleneck, and --methods has none of them"),
        (("--virtual-tokens", 0), "--virtual-tokens: expected at least 1"),
        (("--batch-size", 0), "--batch-size"),
    ],
)
def test_wrong_usage_of_compare_is_found_before_anything_runs(compare, tmp_path, arguments, says):
    code, out, err = compare(*arguments)
    assert code == 2 and out == "" and says in " ".join(err.replace("│", " ").split())
    assert not (tmp_path / "all").exists()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the child in /proc")
def test_what_compare_has_started_ends_with_it(model, data, tmp_path):
    rows = [f"--data={data}", f"--eval-data={data}", "--methods=lora", "--epochs=100000"]
    line = [
        sys.executable,
        "-m",
        "peft_engine",
        "compare",
        f"--model={model}",
        f"--output={tmp_path / 'all'}",
    ]
    with subprocess.Popen([*line, *rows], stderr=subprocess.PIPE, text=True) as process:
        told = []
        for text in process.stderr:
            told.append(text)
            if "lora: Training" in text:
                break
        (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.terminate()
        rest = process.stderr.read()
    assert process.returncode == 1 and rest.endswith("peft-engine: interrupted\n"), "".join(told) + rest
    assert not Path(f"/proc/{child}").exists()


def test_the_command_line_that_compare_gives_to_train_means_the_settings(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr("peft_engine.train.run.run", lambda settings, say: seen.append(settings) or 1 / 0)
    for method in METHODS:
        settings = Comparison(
            methods=METHODS, model="m", data=tmp_path / "d", eval_data=tmp_path / "e", output=tmp_path / "o",
            quantize="nf4", max_length=50, overwrite=True, rates=rates_of(["0.5", "prefix=2e-3"], METHODS),
            options=MethodOptions(
                rank=3, target_modules=["q_proj", "v_proj"], virtual_tokens=5, prefix_projection=True, width=7
            ),
            loop=LoopSettings(max_steps=3, gradient_checkpointing=True),
        ).run(method)  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["peft-engine", *arguments(settings)])
        with pytest.raises(SystemExit):
            main()
        assert seen[-1].to_dict() == settings.to_dict()
        assert settings.loop.learning_rate == (2e-3 if method == "prefix" else 0.5)
        assert settings.base == "nf4"
    assert methods_of("all") == METHODS
