"""What eval, generate, explain and merge say before they read the model, which may take minutes."""

import json
import shutil

import pytest
from texts import reviews, tiny_tokenizer, write_jsonl

CONFIGS = {
    "prefix": {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 100},
    "prompt": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 100},
    "bottleneck": {"config": {"mh_adapter": False}, "name": "default"},
}


@pytest.fixture
def early(command, monkeypatch):
    """The last line on standard error of a command that must not come as far as to read a model."""

    def read(*arguments, **more):
        pytest.fail("the model was read")

    def run(*line) -> str:
        code, out, err = command(*line)
        assert code == 1 and out == "" and "Traceback" not in err, err
        return err.strip().splitlines()[-1]

    monkeypatch.setattr("peft_engine.train.models.load_base", read)
    return run


@pytest.fixture
def adapter(tmp_path):
    """A factory of folders that hold an adapter's config, which is enough."""

    def make(kind):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "adapter_config.json").write_text(json.dumps(CONFIGS[kind]))
        return tmp_path / kind

    return make


@pytest.mark.parametrize(
    ("row", "task", "says"),
    [
        ({"prompt": "fine " * 200, "completion": " positive"}, "classify", "with the label, at most 128 are"),
        ({"prompt": "", "completion": " positive"}, "classify", "the prompt has no tokens"),
        ({"prompt": "fine " * 200, "completion": " positive"}, "generate", "at most 128 are allowed"),
        ({"prompt": "", "completion": " a warm film"}, "generate", "has no tokens; an answer cannot follow"),
        ({"text": "fine " * 200}, "generate", "--max-length 128 cuts it in pieces"),
        ({"text": "fine"}, "classify", "--task classify: needs rows of prompt and completion"),
    ],
)
def test_eval_tells_of_rows_that_cannot_be_measured(early, model, tmp_path, row, task, says):
    data = write_jsonl(tmp_path / "rows.jsonl", [row] * 2)
    said = early("eval", "--model", model, "--data", data, "--task", task)
    assert says in said and (row == {"text": "fine"} or "line 1: " in said)


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_the_positions_that_an_adapter_takes_are_counted(early, model, adapter, tmp_path, kind):
    row = {"prompt": "fine " * 40, "completion": " positive"}
    data, folder = write_jsonl(tmp_path / "rows.jsonl", [row] * 2), adapter(kind)
    line = ("--model", model, "--adapter", folder)
    assert "at most 28 are allowed" in early("eval", *line, "--data", data)
    assert "at most 28 are allowed" in early("eval", *line, "--data", data, "--task", "generate")
    said = early("generate", *line, "--prompt", "fine film", "--max-new-tokens", 27)
    assert "27 new ones exceed the model's 28" in said


def test_generate_tells_of_prompts_that_cannot_be_answered(early, model, tmp_path):
    prompts = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a"}, {"prompt": "fine " * 200}])
    assert "the prompt '' has no tokens" in early("generate", "--model", model, "--prompt", "")
    said = early("generate", "--model", model, "--prompt-file", prompts, "--max-new-tokens", 2)
    assert f"{prompts}, line 2: a prompt of" in said
    silent = shutil.copytree(model, tmp_path / "silent")
    (silent / "chat_template.jinja").unlink()
    tiny_tokenizer(chat=False).save_pretrained(silent)
    assert "--chat: the tokenizer has no" in early("generate", "--model", silent, "--prompt", "a", "--chat")


def test_a_folder_without_an_adapter_is_told(early, model, tmp_path):
    data = write_jsonl(tmp_path / "rows.jsonl", reviews())
    for name, *more in (
        ("eval", "--data", data), ("generate", "--prompt", "a"), ("explain",), ("merge", "--output", "new"),
    ):  # fmt: skip
        for folder in (tmp_path, tmp_path / "none"):
            said = early(name, "--model", model, "--adapter", folder, *more)
            assert f"--adapter {folder}: has no adapter_config.json; give the folder that train wrote" in said


@pytest.mark.parametrize("kind", CONFIGS)
def test_merge_tells_of_an_adapter_that_is_no_change_of_weights(early, model, adapter, tmp_path, kind):
    folder = adapter(kind)
    said = early("merge", "--model", model, "--adapter", folder, "--output", tmp_path / "merged")
    assert f"--adapter {folder}: is a {kind} adapter, and what it computes is no change of a weight" in said
    assert not (tmp_path / "merged").exists()
