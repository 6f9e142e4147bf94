"""Rows from files to packed micro-batches: what becomes a token, what is learnt, what is refused."""

import csv
import gzip
import json

import pytest
import torch
from texts import CHAT, reviews, tiny_tokenizer, write_jsonl
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from peft_engine.train.data import IGNORE, DataError, length_limit, pack, read_prompts, read_rows, tokenize
from peft_engine.train.data_files import MOST_IN_A_FIELD


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def _read(tmp_path, *lines):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return read_rows(path)


def _learnt(document, tokenizer):
    return tokenizer.decode([label for label in document.labels if label != IGNORE])


# --- reading ------------------------------------------------------------------------------------------------


def test_jsonl_csv_and_gz_give_the_same_rows(tmp_path):
    rows = reviews()
    jsonl = write_jsonl(tmp_path / "a.jsonl", rows)
    with open(tmp_path / "a.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(rows)
    paths = [jsonl, tmp_path / "a.csv"]
    for path in list(paths):
        zipped = path.with_name(path.name + ".gz")
        zipped.write_bytes(gzip.compress(path.read_bytes()))
        paths.append(zipped)
    for path in paths:
        assert [row.fields for row in read_rows(path)] == rows


def test_a_byte_order_mark_is_no_part_of_a_quoted_column_or_of_the_first_row(tmp_path):
    quoted = '\ufeff"adapter","prompt"\r\n"movies","a"\r\n'
    (tmp_path / "a.csv").write_text(quoted, encoding="utf-8", newline="")
    assert read_prompts(tmp_path / "a.csv").adapters == ["movies"]
    assert [row.fields for row in _read(tmp_path, '\ufeff{"text": "a"}', '\ufeff{"text": "b"}')] == [
        {"text": "a"}, {"text": "b"},
    ]  # fmt: skip


def test_other_columns_and_blank_lines_are_left_alone(tmp_path):
    rows = _read(tmp_path, '{"id": 7, "text": "a"}', "", '{"id": 8, "text": "b"}')
    assert [row.fields for row in rows] == [{"text": "a"}, {"text": "b"}]


def test_messages_in_csv_are_json(tmp_path):
    messages = [{"role": "user", "content": "hi, you"}, {"role": "assistant", "content": "hello"}]
    with open(tmp_path / "a.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["messages"], [json.dumps(messages)]])
    assert read_rows(tmp_path / "a.csv")[0].fields == {"messages": messages}


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (['{"text": "a"}', '{"text": '], ["line 2", "broken JSON"]),
        (['{"text": "a"}', "", "[1]"], ["line 3", "JSON object", "list"]),
        (['{"question": "a", "answer": "b"}'], ["line 1", "prompt and completion", "question, answer"]),
        (['{"prompt": "a"}'], ["line 1", "prompt and completion"]),
        (['{"prompt": "a", "completion": ""}'], ["line 1", "completion is empty"]),
        (['{"prompt": "a", "completion": "  \\n"}'], ["line 1", "completion is empty"]),
        (['{"prompt": "a", "completion": 3}'], ["line 1", "completion must be a string", "int"]),
        (['{"text": "a"}', '{"prompt": "a", "completion": "b"}'], ["line 2", "split the file"]),
        (['{"messages": "hello"}'], ["line 1", "messages must be a list"]),
        (['{"messages": [{"role": "user"}]}'], ["line 1", "role and a content"]),
        (['{"messages": [{"role": "user", "content": "a"}]}'], ["line 1", "no message of the assistant"]),
        ([""], ["holds no rows"]),
        (['{"text": "a"}', '{"text": "half a \\ud83d pair"}'], ["line 2", "text", "surrogate"]),
        (
            ['{"messages": [{"role": "assistant", "content": "\\udc00"}]}'],
            ["line 1", "content", "surrogate"],
        ),
        (
            ['{"text": "a"}', '{"text": "b", "id": 1, "text": "c"}'],
            ["line 2", "several values are named text;"],
        ),
        (['{"messages": [{"role": "a", "role": "b", "content": "c"}]}'], ["line 1", "are named role;"]),
        (['{"text": "a"}', '{"text": ' + "[" * 100_000], ["line 2", "nested too deeply"]),
        (['{"text": "a"}', '{"text": "b", "id": ' + "9" * 5000 + "}"], ["line 2", "5000", "digits"]),
    ],
)
def test_a_bad_row_is_refused_with_its_line(tmp_path, lines, says):
    with pytest.raises(DataError) as error:
        _read(tmp_path, *lines)
    for text in ("rows.jsonl", *says):
        assert text in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_an_unknown_ending_and_bytes_that_are_no_text_are_refused(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        read_rows(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="/dev/null: is no file"):
        read_rows("/dev/null")
    with pytest.raises(DataError, match="is a folder"):
        read_rows(tmp_path)
    (tmp_path / "a.parquet").touch()
    with pytest.raises(DataError, match=r"ending in \.jsonl or \.csv"):
        read_rows(tmp_path / "a.parquet")
    whole = gzip.compress(b'{"text": "a"}\n' * 99)
    for broken in (b"not gzip", whole[:-9], whole[:10] + b"\xff" + whole[11:]):  # the last: zlib's own error
        (tmp_path / "b.jsonl.gz").write_bytes(broken)
        with pytest.raises(DataError, match=r"b\.jsonl\.gz: cannot be read"):
            read_rows(tmp_path / "b.jsonl.gz")


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.jsonl.gz", "a.csv.gz"])
@pytest.mark.parametrize(
    ("content", "line"),
    [
        ('{"text": "a"}\n'.encode("utf-16"), 1),  # its first byte is no UTF-8
        (b"\xff", 1),
        (b'{"text": "caf\xe9"}\n', 1),
        (b'{"text":"a"}\n' * 5000 + b'"caf\xc3', 5001),
    ],
)
def test_bytes_that_are_no_text_are_refused_with_their_line(tmp_path, name, content, line):
    if ".csv" in name:
        content = content.replace(b'{"text":"a"}\n', b"text\n")
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    with pytest.raises(DataError, match=rf"{name}, line {line}: not UTF-8: .*; save the file as UTF-8"):
        read_rows(tmp_path / name)


def test_a_csv_row_with_too_many_values_is_refused_with_its_line(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,completion\na,b\na,b,c\n")
    with pytest.raises(DataError, match="line 3: more values"):
        read_rows(tmp_path / "a.csv")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("prompt,completion\na,b\na\n", "line 3: no value for completion .*prompt, completion"),
        ("completion,id,prompt\na\n", "line 2: no value for prompt "),
        ('messages,id\n"",3\n', "line 2: no value for messages "),
    ],
)
def test_a_csv_row_without_a_value_is_refused_with_its_line_and_the_column(tmp_path, text, says):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(DataError, match=says):
        read_rows(tmp_path / "a.csv")


def test_a_value_that_is_null_is_named_and_one_of_another_column_may_be_missing(tmp_path):
    with pytest.raises(DataError, match="line 1: no value for completion "):
        _read(tmp_path, '{"prompt": "a", "completion": null}')
    (tmp_path / "a.csv").write_text("id,prompt\n3\n")
    with pytest.raises(DataError, match=r"a\.csv, line 2: no value for prompt "):
        read_prompts(tmp_path / "a.csv")
    (tmp_path / "b.csv").write_text("prompt,completion,note\na,b\n")
    assert read_rows(tmp_path / "b.csv")[0].fields == {"prompt": "a", "completion": "b"}


@pytest.mark.parametrize("sign", [";", "\t", "|"])
def test_columns_that_no_comma_separates_are_told(tmp_path, sign):
    (tmp_path / "a.csv").write_text(f"prompt{sign}completion\na{sign}b\n")
    with pytest.raises(DataError, match=r"a\.csv, line 1: one column, .*; separate the columns by commas"):
        read_rows(tmp_path / "a.csv")


def test_two_columns_of_one_name_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,completion,prompt\na,b,c\n")
    with pytest.raises(DataError, match=r"a\.csv, line 1: several columns are named prompt; rename"):
        read_rows(tmp_path / "a.csv")
    (tmp_path / "b.csv").write_text("text,,\na,,\n")  # as spreadsheets leave columns without a name
    assert read_rows(tmp_path / "b.csv")[0].fields == {"text": "a"}


def test_a_long_csv_field_is_read_and_one_without_end_is_refused_with_its_line_and_the_mend(tmp_path):
    long = "fine " * 100_000
    (tmp_path / "a.csv").write_text(f'text\na\n"{long}"\n')
    before = csv.field_size_limit()
    assert [row.fields["text"] for row in read_rows(tmp_path / "a.csv")] == ["a", long]
    (tmp_path / "b.csv").write_text('text\na\n"' + "x" * (MOST_IN_A_FIELD + 1) + '"\n')
    with pytest.raises(DataError, match=r"b\.csv, line 3: .*16 MiB.*JSONL"):
        read_rows(tmp_path / "b.csv")
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    "messages", ["[" * 100_000, '[{"role": "assistant", "content": "\\udc00"}]', "9" * 5000, "{"]
)
def test_messages_in_csv_that_are_no_json_are_refused_with_their_line(tmp_path, messages):
    with open(tmp_path / "a.csv", "w", newline="") as file:
        csv.writer(file).writerows([["messages"], [messages]])
    with pytest.raises(DataError, match=r"a\.csv, line 2: "):
        read_rows(tmp_path / "a.csv")


# --- tokens -------------------------------------------------------------------------------------------------


def test_prompt_and_completion_are_tokenised_apart_and_only_the_completion_and_the_end_are_learnt(
    tmp_path, tokenizer
):
    row = {"prompt": "Review: a fi", "completion": "ne film "}
    (document,) = tokenize(_read(tmp_path, json.dumps(row)), tokenizer, 100)
    apart = [tokenizer(row[c], add_special_tokens=False)["input_ids"] for c in ("prompt", "completion")]
    assert document.input_ids == [*apart[0], *apart[1], tokenizer.eos_token_id]
    assert document.labels == [IGNORE] * len(apart[0]) + [*apart[1], tokenizer.eos_token_id]
    assert tokenizer.decode(document.input_ids[:-1]) == row["prompt"] + row["completion"]


def _spaced(kind):
    """As the tiny one, but with a space put before a text: Llama 2's old and new ways, and a GPT-2's."""
    tokenizer = tiny_tokenizer()
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    if kind == "normalizer":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif kind == "bytes":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
    backend.decoder = decoders.Replace("▁", " ") if kind != "bytes" else decoders.ByteLevel()
    special = ["<unk>", "<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=90, special_tokens=special, show_progress=False)
    backend.train_from_iterator([row["prompt"] + row["completion"] + CHAT for row in reviews()], trainer)
    tokenizer._tokenizer = backend
    tokenizer.unk_token = "<unk>"
    return tokenizer


@pytest.mark.parametrize("kind", ["normalizer", "first", "always", "bytes"])
def test_a_tokenizer_that_puts_a_space_before_a_text_puts_none_before_a_completion(tmp_path, kind):
    tokenizer = _spaced(kind)
    assert tokenizer.decode(tokenizer("fine")["input_ids"]) == " fine"
    prompt = "Review: a film\nSentiment:"
    for completion in (" positive", "positive", "\npositive", "  positive"):
        row = json.dumps({"prompt": prompt, "completion": completion})
        (document,) = tokenize(_read(tmp_path, row), tokenizer, 100)
        assert tokenizer.decode(document.input_ids[:-1]) == f" {prompt}{completion}"
        assert document.input_ids[: len(tokenizer(prompt)["input_ids"])] == tokenizer(prompt)["input_ids"]


@pytest.mark.parametrize("kind", ["normalizer", "first", "always", "bytes"])
def test_the_turns_of_a_conversation_have_the_tokens_of_the_whole(tmp_path, kind):
    tokenizer = _spaced(kind)
    turns = (("user", "warm"), ("assistant", "fine"), ("user", "cold film"), ("assistant", "dull"))
    messages = [{"role": role, "content": content} for role, content in turns]
    (document,) = tokenize(_read(tmp_path, json.dumps({"messages": messages})), tokenizer, 200)
    assert document.input_ids == tokenizer.apply_chat_template(messages)["input_ids"]
    asked = tokenizer.apply_chat_template(messages[:3], add_generation_prompt=True)["input_ids"]
    assert document.input_ids[: len(asked)] == asked  # as generate and eval give it to the model
    assert document.labels[len(asked) - 1] == IGNORE != document.labels[len(asked)]
    learnt = _learnt(document, tokenizer)
    assert learnt.replace(" ", "") == "fine</s>\ndull</s>\n" and not learnt.startswith(" ")


def test_a_token_that_would_reach_into_an_answer_is_cut_where_the_answer_begins(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'][0] }}: a fi{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}a: a fi{% endif %}"
    )
    messages = [{"role": "user", "content": "."}, {"role": "assistant", "content": "ne film"}]
    (document,) = tokenize(_read(tmp_path, json.dumps({"messages": messages})), tokenizer, 100)
    asked = tokenizer("u: a fi.a: a fi")["input_ids"]
    assert document.input_ids != tokenizer.apply_chat_template(messages)["input_ids"]
    assert document.input_ids == asked + tokenizer("ne film")["input_ids"]
    assert _learnt(document, tokenizer) == "ne film"


def test_a_tokenizer_that_adds_the_end_by_itself_gives_one_end(tmp_path):
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        "<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    row = {"prompt": "Review", "completion": " positive"}
    (document,) = tokenize(_read(tmp_path, json.dumps(row)), tokenizer, 100)
    assert document.input_ids[0] == 1
    assert document.input_ids.count(2) == 1
    assert document.input_ids[-1] == 2


def test_a_tokenizer_without_an_end_is_refused_where_the_end_would_be_learnt(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    text = _read(tmp_path, '{"text": "a fine film"}')
    with pytest.raises(DataError, match="no end-of-sequence token"):
        tokenize(text, tokenizer, 100)
    assert len(tokenize(text, tokenizer, 100, learn_end=False)) == 1
    messages = _read(tmp_path, '{"messages": [{"role": "assistant", "content": "fine"}]}')
    assert len(tokenize(messages, tokenizer, 100)) == 1


def test_an_empty_prompt_learns_the_completion_from_its_second_token(tmp_path, tokenizer):
    (document,) = tokenize(_read(tmp_path, '{"prompt": "", "completion": "warm film"}'), tokenizer, 100)
    assert document.labels[0] == IGNORE
    assert document.labels[1:] == document.input_ids[1:]


def test_text_is_learnt_whole_but_its_first_token(tmp_path, tokenizer):
    (document,) = tokenize(_read(tmp_path, '{"text": "a fine film"}'), tokenizer, 100)
    assert document.labels == [IGNORE, *document.input_ids[1:]]
    assert document.input_ids[-1] == tokenizer.eos_token_id


def test_messages_use_the_chat_template_and_learn_every_turn_of_the_assistant(tmp_path, tokenizer):
    messages = [
        {"role": "user", "content": "warm?"},
        {"role": "assistant", "content": "fine"},
        {"role": "user", "content": "cold?"},
        {"role": "assistant", "content": "dull"},
    ]
    (document,) = tokenize(_read(tmp_path, json.dumps({"messages": messages})), tokenizer, 200)
    assert tokenizer.decode(document.input_ids) == tokenizer.apply_chat_template(messages, tokenize=False)
    assert _learnt(document, tokenizer) == "fine</s>\ndull</s>\n"


def test_messages_without_a_chat_template_are_refused(tmp_path):
    row = {"messages": [{"role": "assistant", "content": "fine"}]}
    with pytest.raises(DataError, match="line 1: the tokenizer has no chat template"):
        tokenize(_read(tmp_path, json.dumps(row)), tiny_tokenizer(chat=False), 100)


def test_a_chat_template_that_changes_earlier_turns_is_refused(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages|length }}" + tokenizer.chat_template
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    with pytest.raises(DataError, match="changes earlier turns"):
        tokenize(_read(tmp_path, json.dumps(row)), tokenizer, 100)


def test_a_row_longer_than_the_model_is_refused_with_its_line_and_both_lengths(tmp_path, tokenizer):
    rows = _read(tmp_path, '{"text": "a"}', json.dumps({"text": "fine " * 50}))
    says = r"line 2: \d+ tokens, at most 20 .*; --max-length 20 cuts it in pieces, or leave it out"
    with pytest.raises(DataError, match=says):
        tokenize(rows, tokenizer, 20)
    rows = _read(tmp_path, json.dumps({"prompt": "fine " * 50, "completion": "a"}))
    with pytest.raises(DataError, match=r"line 1: .*; shorten the row, or leave it out"):
        tokenize(rows, tokenizer, 20)


def test_long_text_is_cut_into_pieces_when_asked_to_and_loses_nothing(tmp_path, tokenizer):
    (whole,) = tokenize(_read(tmp_path, json.dumps({"text": "fine " * 50})), tokenizer, 1000)
    pieces = tokenize(_read(tmp_path, json.dumps({"text": "fine " * 50})), tokenizer, 20, split_text=True)
    assert [i for piece in pieces for i in piece.input_ids] == whole.input_ids
    assert all(len(piece.input_ids) <= 20 and piece.labels[0] == IGNORE for piece in pieces)


def test_max_length_beyond_the_model_is_refused(tiny_llama):
    config = tiny_llama().config
    assert length_limit(config, None) == 128
    assert length_limit(config, 64) == 64
    with pytest.raises(DataError, match="the model takes 128 tokens, got 129"):
        length_limit(config, 129)


# --- packed batches -----------------------------------------------------------------------------------------


def _documents(tmp_path, tokenizer):
    return tokenize(read_rows(write_jsonl(tmp_path / "a.jsonl", reviews())), tokenizer, 128)


def test_a_micro_batch_is_one_row_without_padding_whose_positions_restart(tmp_path, tokenizer):
    documents = _documents(tmp_path, tokenizer)[:3]
    batch = pack(documents)
    lengths = [len(d.input_ids) for d in documents]
    assert all(value.shape == (1, sum(lengths)) and value.dtype == torch.int64 for value in batch.values())
    assert batch["position_ids"][0].tolist() == [i for n in lengths for i in range(n)]
    starts = [sum(lengths[:i]) for i in range(3)]
    assert (batch["labels"][0, starts] == IGNORE).all()
    assert "attention_mask" not in batch


def test_packed_documents_do_not_see_each_other(tmp_path, tokenizer, tiny_llama):
    model = tiny_llama(vocab_size=len(tokenizer))
    documents = _documents(tmp_path, tokenizer)[:3]
    batch = pack(documents)
    with torch.no_grad():
        packed = model(**batch, use_cache=False).logits[0]
        apart = torch.cat([model(**pack([d]), use_cache=False).logits[0] for d in documents])
        leaking = model(**batch, attention_mask=torch.ones_like(batch["input_ids"]), use_cache=False).logits[
            0
        ]
    floor = (packed - apart).abs().max()
    assert floor < 1e-5 * packed.abs().max()
    assert (leaking - apart).abs().max() > 100 * floor  # the test would notice


def test_the_packed_loss_is_the_mean_over_all_labelled_tokens(tmp_path, tokenizer, tiny_llama):
    model = tiny_llama(vocab_size=len(tokenizer), dtype=torch.float64)
    documents = _documents(tmp_path, tokenizer)
    with torch.no_grad():
        packed = model(**pack(documents), use_cache=False).loss
        apart = sum(model(**pack([d]), use_cache=False).loss * d.labelled for d in documents)
    torch.testing.assert_close(packed, apart / sum(d.labelled for d in documents))
