"""`peft-engine train` as a user types it: what it leaves behind, and what it says when it cannot."""

import json
import math
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from texts import reviews, write_jsonl

from peft_engine.cli import main
from peft_engine.train import progress
from peft_engine.train.models import ModelError, load_base

ROOT = Path(__file__).parents[2]


@pytest.fixture
def data(tmp_path) -> Path:
    return write_jsonl(tmp_path / "rows.jsonl", reviews(2))


@pytest.fixture
def train(command, model, data, tmp_path):
    def run(*more, output=tmp_path / "out", data=data, model=model):
        return command(
            "train", "--model", model, "--data", data, "--output", output, "--learning-rate", 0.01,
            "--batch-size", 4, "--rank", 4, *more,
        )  # fmt: skip

    return run


def _failed(result, *says) -> None:
    code, out, err = result
    assert code == 1 and out == ""
    last = err.strip().splitlines()[-1]
    assert last.startswith("peft-engine: error: "), err
    assert "Traceback" not in err
    for text in says:
        assert text in last


def test_train_writes_the_adapter_the_record_and_the_picture(train, tmp_path, data):
    code, _, err = train("--epochs", 3)
    assert code == 0, err
    folder = tmp_path / "out"
    assert {"adapter_config.json", "adapter_model.safetensors", "run.json", "loss.png"} <= {
        p.name for p in folder.iterdir()
    }
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((folder / "run.json").read_text())
    assert record["method"] == "qlora" and record["steps"] == len(record["losses"]) == 12
    assert record["losses"][-1] < record["losses"][0]
    assert record["tokens"] > record["labelled_tokens"] == 3 * 16 * 2  # the label and the end
    assert record["tokens_per_second"] == pytest.approx(record["tokens"] / record["train_seconds"])
    assert record["peak_rss_bytes"] > 10**8
    tensors = load_file(folder / "adapter_model.safetensors")
    assert record["trainable_parameters"] == sum(t.numel() for t in tensors.values())
    assert record["settings"]["quantize"] == "nf4" and record["settings"]["rank"] == 4
    assert record["settings"]["data"] == str(data)
    assert record["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert record["saved"] == "last" and record["saved_step"] == 12
    assert "12 steps" in err and "ETA" in err and "tokens/s" in err
    last = err.strip().splitlines()[-1]
    assert last.startswith("Next: peft-engine generate --model") and last.endswith(" --prompt ...")


def test_the_plan_counts_the_pieces_that_long_texts_are_cut_in(train, tmp_path, data):
    long = write_jsonl(tmp_path / "long.jsonl", [{"text": "fine " * 50}, {"text": "a fine warm film"}])
    code, _, err = train("--max-length", 20, "--eval-data", long, data=long)
    assert code == 0, err
    pieces = int(re.search(rf"Data: (\d+) pieces of 2 rows of {long}, ", err)[1])
    assert pieces > 2 and f"Evaluation: {pieces} pieces of 2 rows of {long};" in err
    assert f"Training: {(pieces + 3) // 4} steps of 4 x 1 pieces, " in err
    err = train("--overwrite", "--max-length", 60, "--max-steps", 1)[2]
    assert f"Data: 16 rows of {data}, " in err and "of 4 x 1 rows, " in err


def test_json_on_standard_output_is_the_record_and_nothing_else(train, tmp_path):
    code, out, _ = train("--json", "--max-steps", 2)
    assert code == 0
    assert json.loads(out) == json.loads((tmp_path / "out" / "run.json").read_text())


def test_with_evaluation_data_the_record_says_which_state_was_kept(train, tmp_path, data):
    code, _, err = train("--max-steps", 4, "--eval-data", data, "--eval-steps", 2)
    assert code == 0, err
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    losses = {int(step): loss for step, loss in record["eval_losses"].items()}
    assert list(losses) == [2, 4]
    assert record["saved"] == "best" and record["saved_step"] == min(losses, key=losses.get)
    assert "evaluation loss" in err


def test_a_run_that_was_killed_resumes_to_the_same_adapter(train, tmp_path, model, data):
    train("--max-steps", 6, "--save-steps", 2, "--dropout", 0.1, output=tmp_path / "whole")
    train("--max-steps", 6, "--save-steps", 2, "--dropout", 0.1, output=tmp_path / "cut")
    for name in ("adapter_model.safetensors", "adapter_config.json", "run.json"):
        (tmp_path / "cut" / name).unlink()
    shutil.rmtree(tmp_path / "cut" / "checkpoint-6")
    code, _, err = train(
        "--max-steps", 6, "--save-steps", 2, "--dropout", 0.1, "--resume", output=tmp_path / "cut"
    )
    assert code == 0, err
    assert "checkpoint-4" in err
    whole, cut = (load_file(tmp_path / run / "adapter_model.safetensors") for run in ("whole", "cut"))
    assert all(torch.equal(whole[key], cut[key]) for key in whole)
    records = [json.loads((tmp_path / run / "run.json").read_text()) for run in ("whole", "cut")]
    assert records[0]["losses"] == records[1]["losses"]
    assert records[1]["resumed_from_step"] == 4


def test_what_was_done_before_a_resume_does_not_shorten_the_time_that_is_left(capsys, monkeypatch):
    clock = iter((0.0, 60.0))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with progress.bar("Training", 10, 5) as bar:
        bar.update(6)
    assert "6/10" in (said := capsys.readouterr().err) and said.endswith("ETA 4:00\n")


def test_resume_without_a_checkpoint_and_with_other_settings_is_refused(train, tmp_path):
    _failed(train("--resume"), "--resume", "holds no whole checkpoint")
    assert train("--max-steps", 2)[0] == 0
    _failed(train("--resume", "--dropout", 0.5), "dropout was 0.0, is 0.5; give these as they were, or")


def test_a_rank_that_no_layer_holds_names_the_option(train):
    said = train("--method", "lora", "--rank", 5000)
    _failed(said, "rank 5000 is above what", "; lower --rank, or leave the layer out of --target-modules")


def test_a_run_that_is_there_is_not_written_over_unless_asked(train, tmp_path):
    assert train("--max-steps", 1)[0] == 0
    before = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    _failed(train("--max-steps", 2), "holds a run already", "--resume", "--overwrite")
    (tmp_path / "bad.jsonl").write_text("{")
    _failed(train("--overwrite", data=tmp_path / "bad.jsonl"), "line 1")
    _failed(train("--overwrite", "--target-modules", "q_prj"), "q_proj")
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == before
    (tmp_path / "out" / "checkpoint-best").mkdir()  # the user's own
    assert train("--max-steps", 2, "--overwrite", "--save-steps", 1)[0] == 0
    assert (tmp_path / "out" / "checkpoint-best").is_dir()
    assert json.loads((tmp_path / "out" / "run.json").read_text())["steps"] == 2


def test_the_command_runs_as_a_module_from_the_root():
    done = subprocess.run(
        [sys.executable, "-m", "peft_engine", "train", "--model", "x"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "--data" in done.stderr and done.stdout == ""


# --- bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ('{"question": "a"}', ["line 17", "prompt and completion"]),
        ('{"prompt": "a", "completion": " "}', ["line 17", "completion is empty"]),
        ('{"prompt": ', ["line 17", "broken JSON"]),
        (
            json.dumps({"prompt": "fine " * 200, "completion": "a"}),
            ["line 17", "at most 128", "--max-length"],
        ),
    ],
)
def test_a_bad_row_is_named_and_nothing_is_written(train, data, tmp_path, row, says):
    data.write_text(data.read_text() + row)
    _failed(train(), *says)
    assert not (tmp_path / "out").exists()


def test_target_modules_that_match_nothing_list_the_near_names(train):
    _failed(train("--target-modules", "q_prj,v_proj"), "q_prj", "q_proj")


def test_a_rank_above_the_layers_is_refused_once(train):
    _failed(result := train("--rank", 500), "500")
    assert result[2].count("rank 500 is above") == 1


@pytest.mark.parametrize(
    "arguments",
    [("--rank", 0), ("--batch-size", 0), ("--method", "lra"), ("--quantize", "none"), ("--epochs", "x")],
)
def test_wrong_usage_ends_with_code_2_and_names_the_option(train, arguments):
    code, out, err = train(*arguments)
    assert code == 2 and out == "" and arguments[0] in err and "Traceback" not in err


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("config.json", b"[]", "its config.json cannot be read"),
        ("config.json", b"null", "its config.json cannot be read"),
        ("config.json", b"{", "its config.json cannot be read"),
        ("config.json", b'{"model_type": "llama", "hidden_size": "x"}', "expected int, got str"),
        ("tokenizer.json", b"[]", "its tokenizer cannot be read"),
        ("tokenizer_config.json", b"[]", "its tokenizer cannot be read"),
        ("generation_config.json", b"[]", "its weights cannot be read"),
        ("model.safetensors", None, "incomplete metadata"),
        ("model.safetensors", b"", "its weights cannot be read"),
    ],
)
def test_a_broken_file_of_the_model_names_the_folder_and_the_mend(
    train, model, tmp_path, method, file, content, says
):
    broken = shutil.copytree(model, tmp_path / "broken")
    whole = (broken / file).read_bytes()
    (broken / file).write_bytes(whole[:-100] if content is None else content)
    result = train("--method", method, model=broken)
    mend = "cut short?" if method == "qlora" and file.endswith(".safetensors") else "is the folder whole"
    _failed(result, f"--model {broken}: ", says, mend)
    assert not (tmp_path / "out" / "adapter_config.json").exists()


def test_pickled_weights_are_refused_in_4_bit_with_the_way_to_convert_them(train, model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "pickled")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    _failed(result := train(model=folder), "holds pytorch_model.bin and no safetensors", "save_pretrained(")
    assert "copy it again" not in result[2]
    assert train("--method", "lora", "--max-steps", 1, model=folder)[0] == 0


def test_the_same_for_the_commands_that_read_the_tokenizer_first(command, model, data, tmp_path):
    broken = shutil.copytree(model, tmp_path / "broken")
    (broken / "config.json").write_text("[]")
    _failed(command("eval", "--model", broken, "--data", data), f"--model {broken}: its config.json")


def test_memory_that_runs_out_while_reading_is_not_called_a_broken_folder(model, monkeypatch):
    def full(*args, **kwargs):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", full)
    with pytest.raises(RuntimeError, match="can't allocate memory") as error:
        load_base(str(model), quantize="none")
    assert not isinstance(error.value, ModelError)


def test_nan_in_the_weights_names_the_layer_before_training(train, model, tmp_path):
    broken = shutil.copytree(model, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = math.nan
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    for method in ("lora", "qlora"):
        _failed(train("--method", method, model=broken), "model.layers.1.mlp.up_proj", "NaN")


def test_a_loss_that_explodes_keeps_the_last_good_checkpoint(train, tmp_path):
    result = train(
        "--learning-rate", 1e30, "--scheduler", "constant", "--save-steps", 1, "--max-grad-norm", 1e30
    )
    _failed(result, "step ")
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_a_disk_that_fills_while_saving_is_one_line_and_keeps_the_checkpoint_before(train, tmp_path):
    # A limit on the size of a file stands for the full disk: the optimiser's state is twice the adapter.
    options = ("--save-steps", 2, "--max-steps")
    assert train(*options, 2)[0] == 0
    folder = tmp_path / "out"
    size = (folder / "checkpoint-2" / "adapter_model.safetensors").stat().st_size
    before = (folder / "adapter_model.safetensors").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size * 3 // 2, hard))
    try:
        result = train(*options, 4, "--resume")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    _failed(result, "saving", "checkpoint-4", "checkpoint-2, is whole")
    assert (folder / "adapter_model.safetensors").read_bytes() == before
    assert not (folder / "checkpoint-4").exists()
    assert train(*options, 4, "--resume")[0] == 0


def test_several_processes_are_refused(train, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = train()
    assert code == 1 and "runs in one process, and WORLD_SIZE is 2" in err and not (tmp_path / "out").exists()


def test_a_missing_model_folder_is_named(train, tmp_path):
    _failed(train(model=tmp_path / "none"), f"--model {tmp_path / 'none'}", "no such folder")
    (tmp_path / "empty").mkdir()
    _failed(train(model=tmp_path / "empty"), "no config.json")


def test_a_hub_that_cannot_be_reached_names_the_local_way(train):
    _failed(train(model="someone/some-model"), "someone/some-model", "hub cannot be reached", "--model DIR")


def test_debug_shows_the_traceback(monkeypatch, model, tmp_path):
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "peft-engine",
            "train",
            "--model",
            str(model),
            "--data",
            "none.jsonl",
            "--output",
            str(tmp_path / "o"),
            "--debug",
        ],
    )
    with pytest.raises(ValueError, match=r"none\.jsonl"):
        main()
