"""What eval measures, and the rows that it refuses before it runs the model."""

import copy

import pytest
import torch
import transformers
from texts import tiny_model_folder
from tokenizers import normalizers

from peft_engine.train.data import DataError, Row
from peft_engine.train.evaluate import evaluate


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = tiny_model_folder(tmp_path_factory.mktemp("model"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval(), tokenizer


def pairs(*given: tuple[str, str]) -> list[Row]:
    return [
        Row("completion", {"prompt": prompt, "completion": completion}, f"rows.jsonl, line {i}")
        for i, (prompt, completion) in enumerate(given, 1)
    ]


def without_times(found: dict) -> dict:
    left_out = ("seconds", "tokens_per_second", "perplexity")
    return {key: value for key, value in found.items() if key not in left_out}


# --- classify -----------------------------------------------------------------------------------------------


def test_scores_that_are_not_numbers_are_no_answer(loaded):
    model, tokenizer = copy.deepcopy(loaded[0]), loaded[1]
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer(" film")["input_ids"]] = float("nan")
    rows = pairs(("a", " warm"), ("b", " cold"), ("a film", " cold"), ("b", " warm"))
    for size, says in (
        (1, "line 3 are NaN, .*--dtype float32"),
        (2, "line 3 or of one"),
        (8, "line 1 or of"),
    ):
        with pytest.raises(RuntimeError, match=f"scores of rows.jsonl, {says}"):
            evaluate(model, tokenizer, rows, task="classify", batch_size=size, say=lambda line: None)


def test_labels_of_the_same_tokens_are_named(loaded):
    model, tokenizer = loaded
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    rows = pairs(("a", " warm"), ("b", " cold"), ("c", " Warm"))
    with pytest.raises(DataError, match="the labels ' Warm' and ' warm' are the same tokens"):
        evaluate(model, tokenizer, rows, task="classify")


# --- generate -----------------------------------------------------------------------------------------------


def test_rows_that_each_fit_are_answered_as_far_as_the_model_goes(loaded, monkeypatch):
    model, tokenizer = loaded
    long = "fine " * 115
    rows = pairs((long, " warm"), ("a", " cold" * 60), ("b", " dull"), (long + "film", " cold"))
    asked, answer = [], model.generate

    def watched(input_ids, generation_config, **more):
        asked.append((len(input_ids), input_ids.shape[1] + generation_config.max_new_tokens))
        return answer(input_ids=input_ids, generation_config=generation_config, **more)

    monkeypatch.setattr(model, "generate", watched)
    found = [
        without_times(evaluate(model, tokenizer, rows, task="generate", batch_size=size)) for size in (1, 8)
    ]
    assert found[0] == found[1]
    assert sum(count for count, _ in asked[4:]) == 4 and all(total <= 128 for _, total in asked)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (
            Row("completion", {"prompt": "", "completion": " warm film"}, "line 7"),
            "line 7: the prompt, 0 tokens",
        ),
        (Row("completion", {"prompt": "fine " * 130, "completion": "b"}, "line 7"), "line 7: .* at most 128"),
        (
            Row("messages", {"messages": [{"role": "assistant", "content": "a"}]}, "line 7"),
            "line 7: no message before the assistant's",
        ),
    ],
)
def test_a_row_that_cannot_be_answered_is_named_before_the_model_runs(loaded, monkeypatch, row, says):
    model, tokenizer = loaded
    monkeypatch.setattr(model, "forward", None)
    with pytest.raises(DataError, match=says):
        evaluate(model, tokenizer, [row], task="generate", say=lambda line: None)
