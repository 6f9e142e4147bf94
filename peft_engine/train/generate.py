"""Text from a model: prompts in batches with left padding, or one prompt as a stream of pieces."""

import threading
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from peft_engine.methods import active
from peft_engine.train import encoder_decoder
from peft_engine.train.data import (
    DataError,
    Prompts,
    Rendered,
    encode_prompt,
    length_limit,
    padded_rows,
    read_prompts,
)
from peft_engine.train.models import check_vocabulary, virtual_tokens

COLDEST = 1e-4  # logits divided by less than about 1e-36 overflow, and at this the likeliest is all but sure


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: the likeliest at temperature 0, else drawn from the top_p mass."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"--max-new-tokens: expected at least 1, got {self.max_new_tokens}")
        if self.temperature != 0.0 and not COLDEST <= self.temperature < float("inf"):
            raise ValueError(
                f"--temperature: expected 0 (always the likeliest token) or a number from {COLDEST:g}, got "
                f"{self.temperature}"
            )
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"--top-p: expected a number above 0, up to 1, got {self.top_p}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"--seed: expected a number from 0 up to 2^32, got {self.seed}")


@dataclass(frozen=True)
class Answer:
    """What one adapter (None: the base) made of one prompt; tokens counts the new ones, the end included."""

    prompt: str
    adapter: str | None
    text: str
    tokens: int


def prompts_from(path: Path) -> Prompts:
    """The prompts of a JSONL or CSV file, with its adapter column, or the lines of any other text file."""
    if path.name.removesuffix(".gz").endswith((".jsonl", ".json", ".ndjson", ".csv")):
        return read_prompts(path)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            # Not splitlines: it cuts at form feeds and Unicode's separators too, which may stand in a prompt.
            lines = [line.removesuffix("\r") for line in file.read().split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    if not lines:
        raise DataError(f"{path}: holds no prompts")
    return Prompts(lines, None, [f"{path}, text {i}" for i in range(1, len(lines) + 1)])


def adapters_of(prompts: Prompts, folders: Sequence[Path]) -> list[Path | None]:
    """The folder of each row's adapter, None for the base; a row names a folder by its path or its last part.

    Raises ValueError for a name that is none of the folders, or more than one of them.
    """
    return [
        None if name is None else _folder(name, where, folders)
        for name, where in zip(prompts.adapters or (), prompts.where, strict=True)
    ]


def _folder(name: str, where: str, folders: Sequence[Path]) -> Path:
    path = Path(name)
    exact = [folder for folder in folders if folder == path or folder.resolve() == path.resolve()]
    found = exact or [folder for folder in folders if folder.resolve().name == name]
    if len(found) == 1:
        return found[0]
    given = ", ".join(map(str, folders)) or "none"
    if found:
        raise ValueError(f"{where}: adapter {name!r} is several of those given: {given}; write its path")
    raise ValueError(
        f"{where}: no adapter {name!r} is given; given: {given}; add --adapter, or mend "
        "the row (empty: the base)"
    )


def chat_prompt(tokenizer: Any, text: str) -> Rendered:
    """The text as a user's message, in the tokenizer's chat template, up to where the assistant speaks."""
    if not tokenizer.chat_template:
        raise DataError("--chat: the tokenizer has no chat template; leave the option out")
    messages = [{"role": "user", "content": text}]
    return Rendered(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    adapters: Sequence[str | None] | None = None,
    batch_size: int = 8,
    where: Sequence[str] = (),
) -> Iterator[list[Answer]]:
    """The answers, a batch at a time, in the order of the prompts.

    adapters: one for each prompt, None in it the base; a batch mixes them. None: what is active now.
    where: where each prompt stands, for the DataError of one that cannot be (`encoded`), before the first.
    """
    torch.manual_seed(sampling.seed)
    rows = _encoded(model, tokenizer, prompts, sampling, where)
    work = list(zip(prompts, adapters or [None] * len(prompts), rows, strict=True))
    for start in range(0, len(work), batch_size):
        part = work[start : start + batch_size]
        inputs = _padded(model, tokenizer, [row for _, _, row in part])
        if adapters is None:
            out = _generate(model, tokenizer, inputs, sampling)
        else:
            with active(model, [adapter for _, adapter, _ in part]):
                out = _generate(model, tokenizer, inputs, sampling)
        yield [
            Answer(prompt, adapter, *_decoded(tokenizer, ids, _ends(model, tokenizer)))
            for (prompt, adapter, _), ids in zip(part, out[:, _given(model, inputs) :].tolist(), strict=True)
        ]


def stream(
    model: Any, tokenizer: Any, prompt: str, sampling: Sampling, where: Sequence[str] = ()
) -> Generator[str, None, None]:
    """The answer to one prompt, piece by piece as it is made; an error of the model is raised here.

    To close it (contextlib.closing) is to wait for the token that is being made: no thread is left in torch,
    which would abort the interpreter at its end.
    """
    from transformers import TextIteratorStreamer

    torch.manual_seed(sampling.seed)
    rows = _encoded(model, tokenizer, [prompt], sampling, where)
    inputs = _padded(model, tokenizer, rows)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    failed: list[BaseException] = []
    enough = threading.Event()

    def stop(input_ids: torch.Tensor, scores: Any, **more: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), enough.is_set(), device=input_ids.device)

    def work() -> None:
        try:
            _generate(model, tokenizer, inputs, sampling, streamer=streamer, stopping_criteria=[stop])
        except BaseException as error:
            failed.append(error)
            streamer.end()

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    try:
        yield from (piece for piece in streamer if piece)
    finally:
        enough.set()
        worker.join()
    if failed:
        raise failed[0]


def encoded(
    config: Any, tokenizer: Any, prompts: Sequence[str], room: int, where: Sequence[str], taken: int
) -> list[list[int]]:
    """The tokens of each prompt; DataError for one without any, and for one that leaves no `room` tokens.

    taken: how many of the model's positions an adapter takes.
    """
    limit, rows = length_limit(config, None, taken), []
    apart = encoder_decoder.is_one(config)  # the answer has the decoder's positions, after its first
    encode = encoder_decoder.source if apart else encode_prompt
    for i, prompt in enumerate(prompts):
        at = f"{where[i]}: " if where and where[i] else ""
        rows.append(encode(tokenizer, prompt))
        if not rows[-1]:
            raise DataError(f"{at}the prompt {prompt!r} has no tokens; give some text")
        if (max(len(rows[-1]), room + 1) if apart else len(rows[-1]) + room) > limit:
            raise DataError(
                f"{at}a prompt of {len(rows[-1])} tokens and {room} new ones exceed the model's {limit}; "
                "shorten it, or lower --max-new-tokens"
            )
    check_vocabulary(config, tokenizer, rows)
    return rows


def _encoded(
    model: Any, tokenizer: Any, prompts: Sequence[str], sampling: Sampling, where: Sequence[str]
) -> list[list[int]]:
    room, taken = sampling.max_new_tokens, virtual_tokens(model)
    return encoded(model.config, tokenizer, prompts, room, where, taken)


def positions(model: Any) -> int:
    """The most tokens that the model takes beside what its adapters put before them."""
    return length_limit(model.config, None, virtual_tokens(model))


def _padded(model: Any, tokenizer: Any, rows: Sequence[list[int]]) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask (B, longest), padded on the left: every prompt ends where text begins.

    On the right for an encoder, whose positions may be counted from the left.
    """
    left = not encoder_decoder.is_one(model.config)
    padded = padded_rows(rows, _pad(model, tokenizer), left=left)
    mask = padded_rows([[1] * len(row) for row in rows], 0, left=left)
    return {"input_ids": padded.to(model.device), "attention_mask": mask.to(model.device)}


def _given(model: Any, inputs: dict[str, torch.Tensor]) -> int:
    """How many tokens of what `generate` returns are not new: the prompt, or what a decoder starts from."""
    return 1 if encoder_decoder.is_one(model.config) else inputs["input_ids"].shape[1]


def _generate(model: Any, tokenizer: Any, inputs: dict, sampling: Sampling, **more: Any) -> torch.Tensor:
    from transformers import GenerationConfig

    own = model.generation_config
    drawn = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens, bos_token_id=own.bos_token_id,
        eos_token_id=_ends(model, tokenizer), pad_token_id=_pad(model, tokenizer),
        decoder_start_token_id=own.decoder_start_token_id, forced_bos_token_id=own.forced_bos_token_id,
        **(drawn if sampling.temperature > 0.0 else {}),
    )  # fmt: skip
    # Or transformers adds what the model's own says: beams, a penalty of repetition, strings to stop at, ...
    model.generation_config = config
    try:
        with torch.no_grad():
            return model.generate(**inputs, generation_config=config, **more)
    finally:
        model.generation_config = own


def _ends(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end a text: the model's own, and the tokenizer's, which training puts last."""
    own = model.generation_config.eos_token_id
    ends = own if isinstance(own, list) else [own]
    return sorted({end for end in (*ends, tokenizer.eos_token_id) if end is not None})


def _pad(model: Any, tokenizer: Any) -> int:
    known = (tokenizer.pad_token_id, model.generation_config.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in known if token is not None)


def _decoded(tokenizer: Any, ids: list[int], ends: list[int]) -> tuple[str, int]:
    """The text up to the first end, and how many tokens that took, the end included."""
    count = next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))
    return tokenizer.decode(ids[:count], skip_special_tokens=True), count
