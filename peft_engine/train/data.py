"""From a data file to packed micro-batches.

A row is `prompt` and `completion`, or `messages`, or `text`. It becomes one document: token ids, and a label
for each token that is learnt (-100 elsewhere, and on the first token always: nothing predicts it). A
micro-batch is a few documents back to back in one row of shape (1, total), `position_ids` restarting at each:
most of transformers' models keep such documents apart when there is no attention mask and no cache. Nothing
is padding. For the other models (`packing.py` finds out) it is one document a row, padded, with a mask.
"""

import copy
import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from peft_engine.train.data_files import DataError, check_text, rows_of

IGNORE = -100
NO_END = "the tokenizer has no end-of-sequence token, so the model could not learn to stop; set eos_token"
LISTS = ("normalizers", "pretokenizers")  # what a tokenizer.json's sequences of each hold
KINDS = {"completion": ("prompt", "completion"), "messages": ("messages",), "text": ("text",)}


@dataclass(frozen=True)
class Row:
    """One row of a data file: what it holds, by column, and the line it stands on."""

    kind: str
    fields: dict[str, Any]
    where: str


@dataclass(frozen=True)
class Prompts:
    """Texts to go on from, the adapter that each row names (None: the base), and where the row stands.

    adapters is None where no row has such a column: then all prompts go to the same adapters.
    """

    texts: list[str]
    adapters: list[str | None] | None
    where: list[str]


@dataclass(frozen=True)
class Document:
    """One row as tokens; labels is as long as input_ids and holds -100 for what is not learnt.

    apart: the labels are a decoder's, beside input_ids of an encoder, and all are learnt.
    """

    input_ids: list[int]
    labels: list[int]
    apart: bool = False

    @property
    def tokens(self) -> int:
        return len(self.input_ids) + self.apart * len(self.labels)

    @property
    def labelled(self) -> int:
        return sum(label != IGNORE for label in self.labels)


# --- reading ------------------------------------------------------------------------------------------------


def read_rows(path: str | Path) -> list[Row]:
    """The rows of a JSONL or CSV file (or a .gz of either), checked.

    Every row must be of one kind: prompt and completion, messages, or text. Other columns are left alone.
    Raises DataError that names the file and the line.
    """
    rows: list[Row] = []
    for where, fields in rows_of(Path(path)):
        rows.append(_row(where, fields, rows[0].kind if rows else None))
    if not rows:
        raise DataError(f"{path}: holds no rows")
    return rows


def read_prompts(path: str | Path) -> Prompts:
    """The prompt column of such a file, and its adapter column; DataError as `read_rows`."""
    out, named = Prompts([], [], []), False
    for where, fields in rows_of(Path(path)):
        _check_given(where, fields, ("prompt",))
        if not isinstance(fields.get("prompt"), str):
            raise DataError(f"{where}: expected a prompt, a string; got the columns {_names(fields)}")
        check_text(where, "prompt", fields["prompt"])
        adapter = fields.get("adapter")
        if adapter is not None and not isinstance(adapter, str):
            raise DataError(
                f"{where}: adapter must be the name of a folder, or null for the base; "
                f"got {type(adapter).__name__}"
            )
        named |= "adapter" in fields
        out.texts.append(fields["prompt"])
        out.adapters.append(adapter or None)  # type: ignore[union-attr]
        out.where.append(where)
    if not out.texts:
        raise DataError(f"{path}: holds no rows")
    return out if named else replace(out, adapters=None)


def _names(fields: Mapping[str, Any]) -> str:
    return ", ".join(map(str, fields)) or "none"


def _row(where: str, fields: Mapping[str, Any], expected: str | None) -> Row:
    kind = next((k for k, columns in KINDS.items() if all(fields.get(c) is not None for c in columns)), None)
    if kind is None:
        for columns in KINDS.values():
            _check_given(where, fields, columns)
        raise DataError(
            f"{where}: expected prompt and completion, or messages, or text; got the columns {_names(fields)}"
        )
    if expected is not None and kind != expected:
        raise DataError(
            f"{where}: holds {' and '.join(KINDS[kind])}, the rows before it "
            f"{' and '.join(KINDS[expected])}; split the file"
        )
    if kind == "messages":
        _check_messages(where, fields["messages"])
    else:
        for column in KINDS[kind]:
            if not isinstance(fields[column], str):
                raise DataError(f"{where}: {column} must be a string, got {type(fields[column]).__name__}")
            check_text(where, column, fields[column])
        if not fields[KINDS[kind][-1]].strip():
            raise DataError(
                f"{where}: {KINDS[kind][-1]} is empty; there is nothing to learn from it, leave the row out"
            )
    return Row(kind, {c: fields[c] for c in KINDS[kind]}, where)


def _check_given(where: str, fields: Mapping[str, Any], columns: Sequence[str]) -> None:
    """Of a row that has these columns: that none is without a value, as in a CSV row that ends early."""
    missing = [column for column in columns if column in fields and fields[column] is None]
    if missing and all(column in fields for column in columns):
        raise DataError(
            f"{where}: no value for {' and '.join(missing)} (the columns are {_names(fields)}); write it, or "
            "leave the row out"
        )


def _check_messages(where: str, messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: messages must be a list of objects with role and content")
    for message in messages:
        if not (
            isinstance(message, dict) and all(isinstance(message.get(k), str) for k in ("role", "content"))
        ):
            raise DataError(
                f"{where}: each message must be an object with a role and a content, both strings"
            )
        for part in ("role", "content"):
            check_text(where, part, message[part])
    if not any(message["role"] == "assistant" and message["content"].strip() for message in messages):
        raise DataError(
            f"{where}: no message of the assistant; there is nothing to learn from it, leave the row out"
        )


# --- tokens -------------------------------------------------------------------------------------------------


class Rendered(str):
    """A prompt that a chat template wrote: with all its special tokens, so the tokenizer must add none."""


def encode_prompt(tokenizer: Any, text: str) -> list[int]:
    """A text at the start of a document, with the tokens the tokenizer puts first (bos) but no end.

    Of a `Rendered` one, the tokens that the template wrote and no others.
    """
    if isinstance(text, Rendered):
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = tokenizer(text, add_special_tokens=True)["input_ids"]
    eos = tokenizer.eos_token
    return ids[:-1] if ids and eos and ids[-1] == tokenizer.eos_token_id and not text.endswith(eos) else ids


def encode_completion(tokenizer: Any, text: str) -> list[int]:
    """A text that goes on after a prompt: its own tokens, nothing before or after."""
    return _without_prefix(tokenizer)(text, add_special_tokens=False)["input_ids"]


@functools.lru_cache(maxsize=2)
def _without_prefix(tokenizer: Any) -> Any:
    """The tokenizer, or a copy of it that puts no space before a text.

    Llama 2's and others do, as if a text always began a document: a completion would begin with one more.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return tokenizer
    parts = {name: getattr(backend, name) for name in ("normalizer", "pre_tokenizer")}
    old = {name: part and json.loads(part.__getstate__()) for name, part in parts.items()}
    new = {name: _no_prefix(part) for name, part in old.items()}
    if new == old:
        return tokenizer
    twin = copy.copy(tokenizer)
    twin._tokenizer = type(backend).from_str(json.dumps(json.loads(backend.to_str()) | new))
    return twin


def _no_prefix(part: Any) -> Any:
    """A part of a tokenizer.json without what puts a space before a text."""
    if isinstance(part, list):
        return [_no_prefix(one) for one in part if one.get("type") != "Prepend"]
    if not isinstance(part, dict) or part.get("type") == "Prepend":
        return None
    changes: dict[str, Any] = {key: _no_prefix(part[key]) for key in LISTS if key in part}
    if "prepend_scheme" in part:
        changes["prepend_scheme"] = "never"
    elif "add_prefix_space" in part:
        changes["add_prefix_space"] = False
    return part | changes


def tokenize(
    rows: Iterable[Row], tokenizer: Any, limit: int, *, split_text: bool = False, learn_end: bool = True
) -> list[Document]:
    """One document a row, with the end-of-sequence token at its end unless learn_end is False.

    limit: the most tokens a document may have. A longer row is an error that names its line; split_text cuts
    longer `text` rows into pieces of `limit` instead.
    Raises DataError.
    """
    end = [tokenizer.eos_token_id] if learn_end else []
    documents: list[Document] = []
    for row in rows:
        if end == [None] and row.kind != "messages":  # their template writes its own
            raise DataError(NO_END)
        document = _ENCODERS[row.kind](row, tokenizer, end)
        pieces = [document]
        if len(document.input_ids) > limit:
            if not (split_text and row.kind == "text"):
                mend = f"--max-length {limit} cuts it in pieces" if row.kind == "text" else "shorten the row"
                raise DataError(
                    f"{row.where}: {len(document.input_ids)} tokens, at most {limit} are allowed "
                    f"(the model's length, or --max-length); {mend}, or leave it out"
                )
            pieces = _split(document, limit)
        documents += pieces
        if not any(piece.labelled for piece in pieces):
            raise DataError(f"{row.where}: nothing is left to learn after tokenising; leave the row out")
    return documents


def _split(document: Document, limit: int) -> list[Document]:
    ids = document.input_ids
    pieces = [ids[i : i + limit] for i in range(0, len(ids), limit)]
    return [Document(piece, [IGNORE, *piece[1:]]) for piece in pieces if len(piece) > 1]


def _completion(row: Row, tokenizer: Any, end: list[int]) -> Document:
    prompt = encode_prompt(tokenizer, row.fields["prompt"])
    completion = encode_completion(tokenizer, row.fields["completion"]) + end
    return _document(prompt + completion, [IGNORE] * len(prompt) + completion)


def _text(row: Row, tokenizer: Any, end: list[int]) -> Document:
    ids = encode_prompt(tokenizer, row.fields["text"]) + end
    return _document(ids, ids)


def _document(ids: list[int], labels: Sequence[int]) -> Document:
    return Document(ids, [IGNORE, *labels[1:]])


def _messages(row: Row, tokenizer: Any, end: list[int]) -> Document:
    """The chat template's text; the labels are the assistant's turns, each to the end of its turn.

    A turn's tokens are what it adds to those of the conversation up to it, so the template must only ever
    append. It writes the ends of turns itself: `end` is not used.
    """
    messages = row.fields["messages"]
    if not tokenizer.chat_template:
        raise DataError(
            f"{row.where}: the tokenizer has no chat template; give prompt and completion instead"
        )

    text, ids, labels = "", list[int](), list[int]()
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(row, tokenizer, i, generation=True) if i else ""
        after = render(row, tokenizer, i + 1)
        if not (after.startswith(before) and before.startswith(text)):
            raise DataError(
                f"{row.where}: the tokenizer's chat template changes earlier turns when a turn is added, "
                "so the assistant's part cannot be told apart; give prompt and completion instead"
            )
        for upto, learnt in ((Rendered(before), False), (after, True)):
            whole = encode_prompt(tokenizer, upto)
            apart = whole[: len(ids)] != ids  # a token would reach over the border, as none does in an answer
            tokens = encode_completion(tokenizer, upto[len(text) :]) if apart else whole[len(ids) :]
            ids = ids + tokens
            labels += tokens if learnt else [IGNORE] * len(tokens)
            text = upto
    return _document(ids, labels)


def render(row: Row, tokenizer: Any, upto: int, *, generation: bool = False) -> Rendered:
    """A row's messages before number `upto` in the chat template; generation: up to where the next speaks."""
    messages = row.fields["messages"][:upto]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)
    except Exception as error:  # jinja raises its own kinds, and what the template itself raises
        raise DataError(f"{row.where}: the chat template refuses these messages: {error}") from None
    return Rendered(text)


_ENCODERS = {"completion": _completion, "messages": _messages, "text": _text}


# --- batches ------------------------------------------------------------------------------------------------


Collate = Callable[[Sequence[Document]], dict[str, torch.Tensor]]
"""Makes a micro-batch of documents: `pack` or `pad`."""


def pack(documents: Sequence[Document]) -> dict[str, torch.Tensor]:
    """A micro-batch: documents back to back; input_ids, position_ids and labels, int64 (1, total)."""
    return {
        "input_ids": torch.tensor([[i for d in documents for i in d.input_ids]]),
        "position_ids": torch.tensor([[i for d in documents for i in range(len(d.input_ids))]]),
        "labels": torch.tensor([[i for d in documents for i in d.labels]]),
    }


def pad(documents: Sequence[Document]) -> dict[str, torch.Tensor]:
    """A micro-batch: one document a row, padded on the right; input_ids, attention_mask and labels, int64.

    What the padding holds is never read: its attention_mask is 0, its label -100.
    """
    return {
        "input_ids": padded_rows([d.input_ids for d in documents], 0),
        "attention_mask": padded_rows([[1] * len(d.input_ids) for d in documents], 0),
        "labels": padded_rows([d.labels for d in documents], IGNORE),
    }


def padded_rows(rows: Sequence[list[int]], filler: int, *, left: bool = False) -> torch.Tensor:
    """int64 (rows, longest), filled up on the right, or on the left."""
    longest = max(map(len, rows))
    filled = [(row, [filler] * (longest - len(row))) for row in rows]
    return torch.tensor([fill + row if left else row + fill for row, fill in filled])


def tokens_in(batch: Mapping[str, torch.Tensor]) -> int:
    """How many tokens a micro-batch has, without padding."""
    masks = [mask for name, mask in batch.items() if name.endswith("attention_mask")]
    return int(sum(mask.sum() for mask in masks)) if masks else batch["input_ids"].numel()


def labelled_in(batch: Mapping[str, torch.Tensor]) -> int:
    """How many tokens of a micro-batch are learnt."""
    return int((batch["labels"] != IGNORE).sum())


def micro_batches(
    documents: Sequence[Document], batch_size: int, collate: Collate = pack
) -> Iterator[dict[str, torch.Tensor]]:
    """The documents in order, batch_size to a micro-batch; collate: `pack` or `pad`."""
    for start in range(0, len(documents), batch_size):
        yield collate(documents[start : start + batch_size])


def length_limit(config: Any, max_length: int | None, virtual_tokens: int = 0) -> int:
    """The most tokens a document may have: the model's own limit, or max_length when that is smaller.

    virtual_tokens: how many of the model's positions an adapter takes.
    Raises DataError when max_length is larger than the model takes, or too small to learn from.
    """
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    model = getattr(config, "max_position_embeddings", None)
    if model is not None and virtual_tokens:
        if virtual_tokens > model - 2:
            raise DataError(
                f"--virtual-tokens: the model has {model} positions, got {virtual_tokens}; take fewer"
            )
        model -= virtual_tokens
    if max_length is None:
        return 2**31 if model is None else model
    if max_length < 2:
        raise DataError(f"--max-length: expected at least 2 tokens, got {max_length}")
    if model is not None and max_length > model:
        beside = f" beside {virtual_tokens} virtual ones" if virtual_tokens else ""
        raise DataError(f"--max-length: the model takes {model} tokens{beside}, got {max_length}")
    return max_length
