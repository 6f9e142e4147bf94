"""Models with an encoder and a decoder, as T5 and BART: the encoder reads a row's prompt, the decoder writes
its completion.

Each is a text of its own, with the tokens that the tokenizer puts around one; the model itself makes the
decoder's input of the labels. Such a row cannot stand back to back with others, so a micro-batch is padded.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from peft_engine.train.data import IGNORE, NO_END, DataError, Document, Rendered, Row, padded_rows

DEPTHS = "num_decoder_layers", "decoder_layers"  # T5's and BART's names


def is_one(config: Any) -> bool:
    """Whether a config is of such a model."""
    return bool(getattr(config, "is_encoder_decoder", False))


def reads_text(config: Any) -> bool:
    """Whether transformers has a model for the config that goes from text to text; for a decoder, true."""
    import transformers

    return not is_one(config) or type(config) in transformers.AutoModelForSeq2SeqLM._model_mapping


def auto_class(config: Any) -> Any:
    """The class of transformers that loads the model with its output head."""
    import transformers

    return transformers.AutoModelForSeq2SeqLM if is_one(config) else transformers.AutoModelForCausalLM


def decoder_depth(config: Any) -> int | None:
    """The number of the decoder's layers; None where the config has another form than T5's and BART's."""
    return next((getattr(config, name) for name in DEPTHS if hasattr(config, name)), None)


def set_decoder_depth(config: Any, depth: int) -> None:
    """Of a decoder without an encoder, nothing."""
    for name in DEPTHS:
        if is_one(config) and hasattr(config, name):
            setattr(config, name, depth)


# --- tokens -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """What the decoder writes: tokens, `length` of them from `start` on the text's own, the rest special."""

    ids: list[int]
    start: int
    length: int

    @property
    def own(self) -> list[int]:
        return self.ids[self.start : self.start + self.length]


def source(tokenizer: Any, text: str) -> list[int]:
    """The tokens that the encoder reads; a `Rendered` text has its special ones already."""
    return tokenizer(text, add_special_tokens=not isinstance(text, Rendered))["input_ids"]


def target(tokenizer: Any, text: str) -> Target:
    """The tokens that the decoder writes; without a special one at the end, the end-of-sequence token."""
    ids = tokenizer(text_target=text)["input_ids"]
    own = tokenizer(text_target=text, add_special_tokens=False)["input_ids"]
    start = next((i for i in range(len(ids)) if ids[i : i + len(own)] == own), 0)
    if start + len(own) >= len(ids):
        if tokenizer.eos_token_id is None:
            raise DataError(NO_END)
        ids = [*ids, tokenizer.eos_token_id]
    return Target(ids, start, len(own))


def documents(rows: Iterable[Row], tokenizer: Any, limit: int) -> list[Document]:
    """One document a row: input_ids the encoder's, labels the decoder's. DataError for rows of another kind,
    and for more than `limit` tokens on either side.
    """
    found = []
    for row in rows:
        if row.kind != "completion":
            raise DataError(
                f"{row.where}: holds {row.kind}, and a model with an encoder and a decoder learns from a "
                "prompt and a completion; split the text in what is read and what is written"
            )
        read, written = source(tokenizer, row.fields["prompt"]), target(tokenizer, row.fields["completion"])
        for what, ids in (("prompt", read), ("completion", written.ids)):
            if len(ids) > limit:
                raise DataError(
                    f"{row.where}: the {what} has {len(ids)} tokens, at most {limit} are allowed (the "
                    "model's length, or --max-length); shorten it, or leave the row out"
                )
        if not read:
            raise DataError(f"{row.where}: the prompt has no tokens; give some text, or leave the row out")
        if not written.length:
            raise DataError(f"{row.where}: the completion has no tokens; leave the row out")
        found.append(Document(read, written.ids, apart=True))
    return found


def collate(documents: Sequence[Document]) -> dict[str, torch.Tensor]:
    """A micro-batch: input_ids and attention_mask (B, longest prompt), labels and decoder_attention_mask
    (B, longest completion), int64, padded on the right.
    """
    reads, writes = [d.input_ids for d in documents], [d.labels for d in documents]
    return {
        "input_ids": padded_rows(reads, 0),
        "attention_mask": padded_rows([[1] * len(ids) for ids in reads], 0),
        "labels": padded_rows(writes, IGNORE),
        "decoder_attention_mask": padded_rows([[1] * len(ids) for ids in writes], 0),
    }


# --- scores of labels ---------------------------------------------------------------------------------------


def in_decoder(
    targets: list[Target], model: Any, prompts: Sequence[list[int]], candidates: Sequence[list[int]]
) -> tuple[torch.Tensor, list[list[int]], int]:
    """The way of `labels.label_scores`, with the candidates' `targets` before its arguments: each prompt goes
    through the encoder once, and each label after it through the decoder in a row of its own.
    """
    rows = [Document(prompt, t.ids) for prompt in prompts for t in targets]
    batch = {key: value.to(model.device) for key, value in collate(rows).items()}
    count = len(targets)
    once = {key: batch[key][::count] for key in ("input_ids", "attention_mask")}
    found = model.get_encoder()(**once, return_dict=True)
    found.last_hidden_state = found.last_hidden_state.repeat_interleave(count, dim=0)
    del batch["input_ids"]
    logits = model(**batch, encoder_outputs=found, use_cache=False).logits
    width = logits.shape[1]
    spans = [(i * width + t.start, t.length) for i, t in enumerate(targets * len(prompts))]
    read = int(once["attention_mask"].sum()) + int(batch["decoder_attention_mask"].sum())
    return logits.flatten(0, 1), [list(range(start, start + n)) for start, n in spans], read
