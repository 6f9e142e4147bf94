"""How good a model is on a data file.

classify: the completions are a few labels. A label's score is the log-probability of its tokens after the
prompt, divided by their number; the highest is the model's answer. generate: the greedy answer against the
completion by exact match and token F1 (words, as in SQuAD: Rajpurkar et al. 2016, arXiv 1606.05250), and the
perplexity.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch

from peft_engine.train.console import say as console_say
from peft_engine.train.data import (
    IGNORE,
    Collate,
    DataError,
    Rendered,
    Row,
    encode_completion,
    encode_prompt,
    micro_batches,
    tokenize,
    tokens_in,
)
from peft_engine.train.generate import Sampling, generate
from peft_engine.train.labels import FORWARD_TOKENS, label_scores, scoring_way
from peft_engine.train.packing import Say, collator

MOST_LABELS = 50
MIN_NEW_TOKENS = 16

Watcher = Callable[[int], None]
"""Called with the number of rows done."""


def task_of(rows: Sequence[Row]) -> str:
    """ "classify" when the completions are at most 50 distinct texts, else "generate"."""
    if rows[0].kind != "completion":
        return "generate"
    return "classify" if len({row.fields["completion"] for row in rows}) <= MOST_LABELS else "generate"


def evaluate(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    *,
    task: str | None = None,
    batch_size: int = 16,
    limit: int = 2**31,
    watch: Watcher = lambda done: None,
    say: Say = console_say,
) -> dict[str, Any]:
    """task, rows, accuracy, exact_match, token_f1, perplexity, labels, confusion, tokens_per_second, seconds.

    confusion[i][j] counts the rows of labels[i] that were answered labels[j]. What does not apply is None.
    task: None decides by the data (`task_of`). limit: the most tokens of a row; a longer one is a DataError.
    say gets a line where the model cannot run packed rows; the results are the same then.
    """
    task = task or task_of(rows)
    if task == "classify" and rows[0].kind != "completion":
        raise DataError("--task classify: needs rows of prompt and completion")
    out: dict[str, Any] = dict.fromkeys(
        ("accuracy", "exact_match", "token_f1", "perplexity", "labels", "confusion")
    )
    start = time.perf_counter()
    with torch.no_grad():
        work = _classify if task == "classify" else _generate
        found, tokens = work(model, tokenizer, rows, batch_size, limit, watch, say)
    seconds = time.perf_counter() - start
    return {
        "task": task,
        "rows": len(rows),
        **out,
        **found,
        "tokens_per_second": tokens / seconds,
        "seconds": seconds,
    }


# --- classify -----------------------------------------------------------------------------------------------


def _classify(
    model: Any, tokenizer: Any, rows: Sequence[Row], batch_size: int, limit: int, watch: Watcher, say: Say
) -> tuple[dict[str, Any], int]:
    labels = sorted({row.fields["completion"] for row in rows})
    candidates = [encode_completion(tokenizer, label) for label in labels]
    if not all(candidates):
        raise DataError(f"the label {labels[[bool(c) for c in candidates].index(False)]!r} has no tokens")
    prompts = [encode_prompt(tokenizer, row.fields["prompt"]) for row in rows]
    longest = max(map(len, candidates))
    for row, prompt in zip(rows, prompts, strict=True):
        if not prompt:
            raise DataError(f"{row.where}: the prompt has no tokens; a label cannot be scored after nothing")
        if len(prompt) + longest > limit:
            raise DataError(
                f"{row.where}: {len(prompt) + longest} tokens with the label, at most {limit} are allowed"
            )
    confusion = [[0] * len(labels) for _ in labels]
    way = scoring_way(model, candidates, say)
    done = tokens = 0
    for part in _parts(prompts, sum(len(c) - 1 for c in candidates), batch_size):
        scores, used = label_scores(model, part, candidates, way)
        tokens += used
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


def _generate(
    model: Any, tokenizer: Any, rows: Sequence[Row], batch_size: int, limit: int, watch: Watcher, say: Say
) -> tuple[dict[str, Any], int]:
    loss, tokens = perplexity_loss(model, tokenizer, rows, batch_size, limit, collator(model, say))
    found: dict[str, Any] = {"perplexity": math.exp(min(loss, 700.0))}
    if rows[0].kind == "text":
        watch(len(rows))
        return found, tokens
    pairs = [_question(row, tokenizer) for row in rows]
    longest = max(len(encode_completion(tokenizer, answer)) for _, answer in pairs)
    sampling = Sampling(max_new_tokens=max(MIN_NEW_TOKENS, longest + 1))
    done = exact = 0
    f1 = 0.0
    for answers in generate(
        model, tokenizer, [prompt for prompt, _ in pairs], sampling, batch_size=batch_size
    ):
        for answer in answers:
            wanted = pairs[done][1]
            exact += answer.text.strip() == wanted.strip()
            f1 += token_f1(answer.text, wanted)
            tokens += answer.tokens
            done += 1
        watch(done)
    return found | {"exact_match": exact / len(rows), "token_f1": f1 / len(rows)}, tokens


def _question(row: Row, tokenizer: Any) -> tuple[str, str]:
    """The prompt and the answer wanted; of messages, the last turn of the assistant is the answer."""
    if row.kind == "completion":
        return row.fields["prompt"], row.fields["completion"]
    messages = row.fields["messages"]
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    prompt = tokenizer.apply_chat_template(messages[:last], tokenize=False, add_generation_prompt=True)
    return Rendered(prompt), messages[last]["content"]


def perplexity_loss(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    batch_size: int,
    limit: int,
    collate: Collate | None = None,
) -> tuple[float, int]:
    """The mean loss over the labelled tokens, but for the ends of completions; and the tokens run.

    collate: what `collator` gives for this model; None asks it.
    """
    collate = collate or collator(model)
    documents = tokenize(rows, tokenizer, limit, learn_end=False)
    total, labelled, tokens = 0.0, 0, 0
    for batch in micro_batches(documents, batch_size, collate):
        count = int((batch["labels"] != IGNORE).sum())
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
