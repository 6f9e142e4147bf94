"""How good a model is on a data file.

classify: the completions are a few labels. A label's score is the log-probability of its tokens after the
prompt, divided by their number; the highest is the model's answer. generate: the greedy answer against the
completion by exact match and token F1 (words, as in SQuAD: Rajpurkar et al. 2016, arXiv 1606.05250), and the
perplexity.
"""

import functools
import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch

from peft_engine.train import encoder_decoder
from peft_engine.train.console import say as console_say
from peft_engine.train.data import (
    Collate,
    DataError,
    Document,
    Row,
    encode_completion,
    encode_prompt,
    labelled_in,
    micro_batches,
    render,
    tokenize,
    tokens_in,
)
from peft_engine.train.generate import Sampling, generate, positions
from peft_engine.train.labels import FORWARD_TOKENS, Way, label_scores, scoring_way
from peft_engine.train.models import check_vocabulary
from peft_engine.train.packing import Say, collator

MOST_LABELS = 50
MIN_NEW_TOKENS = 16

Watcher = Callable[[int], None]
"""Called with the number of rows done."""

Work = Callable[[Any, int, Watcher, Say], tuple[dict[str, Any], int]]
"""What is left to do with a model, at a batch size: what it found, and the tokens run."""


def task_of(rows: Sequence[Row]) -> str:
    """ "classify" when the completions are at most 50 distinct texts that come again, else "generate".

    To come again is to have two rows each, on average: of a few answers in free words each is another.
    """
    if rows[0].kind != "completion":
        return "generate"
    distinct = len({row.fields["completion"] for row in rows})
    return "classify" if distinct <= min(MOST_LABELS, len(rows) // 2) else "generate"


def evaluate(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    *,
    task: str | None = None,
    batch_size: int = 16,
    limit: int = 2**31,
    split_text: bool = False,
    watch: Watcher = lambda done: None,
    say: Say = console_say,
) -> dict[str, Any]:
    """What `prepare` gives, of a model that is there."""
    limit = min(limit, positions(model))
    measure = prepare(model.config, tokenizer, rows, task=task, limit=limit, split_text=split_text)
    return measure(model, batch_size, watch, say)


def prepare(
    config: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    *,
    task: str | None = None,
    limit: int = 2**31,
    split_text: bool = False,
) -> Callable[..., dict[str, Any]]:
    """The rows as tokens, checked without the model, and what measures one on them.

    task: None decides by the data (`task_of`). limit: the most tokens of a row; a longer one is a DataError,
    or with split_text, where it is text, cut in pieces.
    """
    task = task or task_of(rows)
    if task == "classify" and rows[0].kind != "completion":
        raise DataError("--task classify: needs rows of prompt and completion")
    work: Work = (
        _classify(config, tokenizer, rows, limit)
        if task == "classify"
        else _generate(config, tokenizer, rows, limit, split_text)
    )

    def measure(
        model: Any, batch_size: int, watch: Watcher = lambda done: None, say: Say = console_say
    ) -> dict[str, Any]:
        """task, rows, accuracy, exact_match, token_f1, perplexity, labels, confusion, tokens_per_second,
        seconds.

        confusion[i][j] counts the rows of labels[i] that were answered labels[j]. What does not apply is
        None. say gets a line where the model cannot run packed rows; the results are the same then.
        """
        out: dict[str, Any] = dict.fromkeys(
            ("accuracy", "exact_match", "token_f1", "perplexity", "labels", "confusion")
        )
        start = time.perf_counter()
        with torch.no_grad():
            found, tokens = work(model, batch_size, watch, say)
        seconds = time.perf_counter() - start
        return {
            "task": task,
            "rows": len(rows),
            **out,
            **found,
            "tokens_per_second": tokens / seconds,
            "seconds": seconds,
        }

    return measure


# --- classify -----------------------------------------------------------------------------------------------


def _classify(config: Any, tokenizer: Any, rows: Sequence[Row], limit: int) -> Work:
    labels = sorted({row.fields["completion"] for row in rows})
    encode: Callable[[Any, str], list[int]] = encode_prompt
    way: Way | None = None
    if encoder_decoder.is_one(config):
        targets = [encoder_decoder.target(tokenizer, label) for label in labels]
        candidates = [target.own for target in targets]
        encode, way = encoder_decoder.source, functools.partial(encoder_decoder.in_decoder, targets)
    else:
        candidates = [encode_completion(tokenizer, label) for label in labels]
    if not all(candidates):
        raise DataError(f"the label {labels[[bool(c) for c in candidates].index(False)]!r} has no tokens")
    for i, ids in enumerate(candidates):
        if candidates.index(ids) < i:
            raise DataError(
                f"the labels {labels[candidates.index(ids)]!r} and {labels[i]!r} are the same tokens, so no "
                "answer can tell them apart; write them otherwise"
            )
    prompts = [encode(tokenizer, row.fields["prompt"]) for row in rows]
    check_vocabulary(config, tokenizer, [*prompts, *candidates])
    longest = max(map(len, candidates))
    for row, prompt in zip(rows, prompts, strict=True):
        if not prompt:
            raise DataError(f"{row.where}: the prompt has no tokens; a label cannot be scored after nothing")
        if len(prompt) + longest > limit:
            raise DataError(
                f"{row.where}: {len(prompt) + longest} tokens with the label, at most {limit} are allowed"
            )
    return functools.partial(_answers, rows, labels, prompts, candidates, way)


def _answers(
    rows: Sequence[Row],
    labels: list[str],
    prompts: list[list[int]],
    candidates: list[list[int]],
    way: Way | None,
    model: Any,
    batch_size: int,
    watch: Watcher,
    say: Say,
) -> tuple[dict[str, Any], int]:
    confusion = [[0] * len(labels) for _ in labels]
    way = way or scoring_way(model, candidates, say)
    done = tokens = 0
    for part in _parts(prompts, sum(len(c) - 1 for c in candidates), batch_size):
        scores, used = label_scores(model, part, candidates, way)
        tokens += used
        unknown = scores.isnan().any(dim=1).tolist()
        if any(unknown):
            where = rows[done + unknown.index(True)].where
            beside = " or of one that runs beside it" if len(part) > 1 else ""
            raise RuntimeError(
                f"eval: the model's scores of {where}{beside} are NaN, so it has no answer; try --dtype "
                "float32, or another adapter"
            )
        for row, best in zip(rows[done : done + len(part)], scores.argmax(dim=1).tolist(), strict=True):
            confusion[labels.index(row.fields["completion"])][best] += 1
        done += len(part)
        watch(done)
    right = sum(confusion[i][i] for i in range(len(labels)))
    return {"accuracy": right / len(rows), "labels": labels, "confusion": confusion}, tokens


def _parts(prompts: list[list[int]], extra: int, batch_size: int) -> list[list[list[int]]]:
    """The prompts in order, in parts of at most batch_size rows and, but for one row, FORWARD_TOKENS."""
    parts: list[list[list[int]]] = []
    room = 0
    for prompt in prompts:
        need = len(prompt) + extra
        if not parts or len(parts[-1]) == batch_size or need > room:
            parts.append([])
            room = FORWARD_TOKENS
        parts[-1].append(prompt)
        room -= need
    return parts


# --- generate -----------------------------------------------------------------------------------------------


def _generate(config: Any, tokenizer: Any, rows: Sequence[Row], limit: int, split_text: bool) -> Work:
    if encoder_decoder.is_one(config):
        documents = encoder_decoder.documents(rows, tokenizer, limit)
    else:
        documents = tokenize(rows, tokenizer, limit, split_text=split_text, learn_end=False)
    check_vocabulary(config, tokenizer, (ids for d in documents for ids in (d.input_ids, d.labels)))
    questions = [] if rows[0].kind == "text" else _questions(config, rows, tokenizer, limit)
    return functools.partial(_texts, len(rows), tokenizer, documents, questions)


def _texts(
    rows: int,
    tokenizer: Any,
    documents: list[Document],
    questions: list[tuple[str, str, int]],
    model: Any,
    batch_size: int,
    watch: Watcher,
    say: Say,
) -> tuple[dict[str, Any], int]:
    loss, tokens = perplexity_loss(model, documents, batch_size, collator(model, say))
    found: dict[str, Any] = {"perplexity": math.exp(min(loss, 700.0))}
    if not questions:
        watch(rows)
        return found, tokens
    done = exact = 0
    f1 = 0.0
    for room, some in itertools.groupby(questions, key=lambda question: question[2]):
        prompts = [prompt for prompt, _, _ in some]
        sampling = Sampling(max_new_tokens=room)
        for answers in generate(model, tokenizer, prompts, sampling, batch_size=batch_size):
            for answer in answers:
                wanted = questions[done][1]
                exact += answer.text.strip() == wanted.strip()
                f1 += token_f1(answer.text, wanted)
                tokens += answer.tokens
                done += 1
            watch(done)
    return found | {"exact_match": exact / rows, "token_f1": f1 / rows}, tokens


def _questions(config: Any, rows: Sequence[Row], tokenizer: Any, limit: int) -> list[tuple[str, str, int]]:
    """The prompt and the answer wanted, and how many tokens an answer may have: for each row as many as the
    longest answer takes, or what is left of the model after its prompt.
    """
    pairs = [_question(row, tokenizer) for row in rows]
    if encoder_decoder.is_one(config):  # an answer has the decoder to itself
        longest = max(len(encoder_decoder.target(tokenizer, answer).ids) for _, answer in pairs)
        return [(*pair, min(max(MIN_NEW_TOKENS, longest), limit - 1)) for pair in pairs]
    longest = max(len(encode_completion(tokenizer, answer)) for _, answer in pairs)
    questions = []
    for row, (prompt, answer) in zip(rows, pairs, strict=True):
        length = len(encode_prompt(tokenizer, prompt))
        if not 0 < length < limit:
            what = (
                "leaves no room for an answer" if length else "has no tokens; an answer cannot follow nothing"
            )
            raise DataError(f"{row.where}: the prompt, {length} tokens of at most {limit}, {what}")
        questions.append((prompt, answer, min(max(MIN_NEW_TOKENS, longest + 1), limit - length)))
    return questions


def _question(row: Row, tokenizer: Any) -> tuple[str, str]:
    """The prompt and the answer wanted; of messages, the last turn of the assistant is the answer."""
    if row.kind == "completion":
        return row.fields["prompt"], row.fields["completion"]
    messages = row.fields["messages"]
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    if last == 0:
        raise DataError(
            f"{row.where}: no message before the assistant's, so there is nothing to answer; add the user's, "
            "or leave the row out"
        )
    return render(row, tokenizer, last, generation=True), messages[last]["content"]


def perplexity_loss(
    model: Any, documents: Sequence[Document], batch_size: int, collate: Collate
) -> tuple[float, int]:
    """The mean loss over the documents' labelled tokens, and the tokens run."""
    total, labelled, tokens = 0.0, 0, 0
    for batch in micro_batches(documents, batch_size, collate):
        count = labelled_in(batch)
        batch = {key: value.to(model.device) for key, value in batch.items()}
        total += float(model(**batch, use_cache=False).loss) * count
        labelled += count
        tokens += tokens_in(batch)
    return total / labelled, tokens


def token_f1(answer: str, wanted: str) -> float:
    """F1 of the words two texts share, counted with their number; 1 when both have none."""
    a, b = answer.split(), wanted.split()
    if not a or not b:
        return float(a == b)
    shared = sum((Counter(a) & Counter(b)).values())
    return 2 * shared / (len(a) + len(b))
