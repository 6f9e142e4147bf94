"""Scores of labels after prompts: the mean log-probability of a label's tokens.

As a tree, in one row: prompts back to back, each followed by the labels (all but their last token), which see
their prompt and themselves. So a prompt is computed once, and labels of one token cost nothing more. Where a
model cannot run that, each prompt and label stand in a row of their own.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from peft_engine.train.console import say as console_say
from peft_engine.train.data import IGNORE, Document, pad
from peft_engine.train.packing import Say, failed, probe_tokens, undisturbed, why_not_apart, why_not_packed

FORWARD_TOKENS = 1024  # a packed forward's attention costs the square of its tokens
WINDOWS = ("window", "window_size", "attention_chunk_size")  # how the names of a config's windows end

Scored = tuple[torch.Tensor, list[list[int]], int]
"""Logits (N, vocabulary); for each prompt and label, the rows that predict its tokens; the tokens run."""
Way = Callable[[Any, Sequence[list[int]], Sequence[list[int]]], Scored]


def label_scores(
    model: Any, prompts: Sequence[list[int]], candidates: Sequence[list[int]], way: Way | None = None
) -> tuple[torch.Tensor, int]:
    """The mean log-probability of each candidate's tokens after each prompt, and the number of tokens run.

    The scores are float32, (prompts, candidates). way: what `scoring_way` gives for this model; None asks it.
    """
    way = way or scoring_way(model, candidates)
    logits, rows, tokens = way(model, prompts, candidates)
    log_probs = logits.float().log_softmax(dim=-1)
    scores = [log_probs[row, candidates[i % len(candidates)]].mean() for i, row in enumerate(rows)]
    return torch.stack(scores).view(len(prompts), len(candidates)), tokens


def scoring_way(model: Any, candidates: Sequence[list[int]], say: Say = console_say) -> Way:
    """`as_a_tree` where the model can, else `in_rows`; then `say` gets a line with the reason."""
    why = why_not_tree(model, several=any(len(c) > 1 for c in candidates))
    if why is None:
        return as_a_tree
    say(f"Packing: off, each label in a row of its own with padding: {why}")
    return in_rows


def why_not_tree(model: Any, *, several: bool) -> str | None:
    """Why labels cannot be scored as a tree; None: they can. several: some label has several tokens."""
    why = why_not_packed(model)
    if why is not None:
        return why
    kind, window = type(model).__name__, _window(model)
    if several and window is not None:
        return f"{kind}'s attention has a window ({window}), which counts the labels in between"
    count = 3 if several else 1
    first, other, second, one, three, two = (
        probe_tokens(model, *span).input_ids
        for span in ((0, 4), (1, 4), (5, 5), (10, count), (11, count), (13, count))
    )
    before, after = ([first, second], [one, two]), ([other, second], [three, two])
    try:
        with undisturbed(model):
            tree = [_last_label(as_a_tree(model, *given)) for given in (before, after)]
            rows = [_last_label(in_rows(model, *given)) for given in (before, after)]
    except Exception as error:  # whatever a model's own code raises
        return failed(kind, "labels as a tree", error)
    return why_not_apart(model, "labels", tree, rows)


def _last_label(scored: Scored) -> torch.Tensor:
    logits, rows, _ = scored
    return logits[rows[-1]]


def _window(model: Any) -> str | None:
    """The first window of the model's attention, by its name in the config and its size."""
    for name, value in vars(model.config.get_text_config()).items():
        if name.endswith(WINDOWS) and isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return f"{name} {value}"
    return None


# --- the two ways -------------------------------------------------------------------------------------------


def as_a_tree(model: Any, prompts: Sequence[list[int]], candidates: Sequence[list[int]]) -> Scored:
    """One forward of one row for all."""
    ids: list[int] = []
    positions: list[int] = []
    row_of: list[int] = []
    candidate_of: list[int] = []
    scored: list[list[int]] = []
    for row, prompt in enumerate(prompts):
        last = len(ids) + len(prompt) - 1
        for candidate, tokens in enumerate([prompt, *(c[:-1] for c in candidates)]):
            before = len(ids)
            first = 0 if candidate == 0 else len(prompt)
            ids += tokens
            positions += range(first, first + len(tokens))
            row_of += [row] * len(tokens)
            candidate_of += [candidate] * len(tokens)
            if candidate:
                # The token that predicts a candidate's first is the prompt's last.
                scored.append([last, *range(before, len(ids))])
    device = model.device
    keep = sorted({place for places in scored for place in places})
    index = {place: i for i, place in enumerate(keep)}
    mask = None
    if any(len(c) > 1 for c in candidates):
        mask = _tree_mask(model, torch.tensor(row_of), torch.tensor(candidate_of)).to(device)
    logits = model(
        input_ids=torch.tensor([ids], device=device),
        position_ids=torch.tensor([positions], device=device),
        attention_mask=mask,
        logits_to_keep=torch.tensor(keep, device=device),
        use_cache=False,
    ).logits[0]
    return logits, [[index[place] for place in places] for places in scored], len(ids)


def _tree_mask(model: Any, row: torch.Tensor, candidate: torch.Tensor) -> torch.Tensor:
    """(1, 1, T, T), additive: a token sees those before it of its row's prompt and of its own candidate."""
    at = torch.arange(len(row))
    same = (row[:, None] == row) & (at[:, None] >= at)
    seen = same & ((candidate == 0) | (candidate[:, None] == candidate))
    mask = torch.zeros(seen.shape, dtype=model.dtype)
    return mask.masked_fill_(~seen, torch.finfo(model.dtype).min)[None, None]


def in_rows(model: Any, prompts: Sequence[list[int]], candidates: Sequence[list[int]]) -> Scored:
    """A row for each prompt and each of the labels' beginnings: all labels of one token share a row."""
    beginnings = list(dict.fromkeys(tuple(c[:-1]) for c in candidates))
    rows = [[*prompt, *beginning] for prompt in prompts for beginning in beginnings]
    firsts = [len(prompt) - 1 for prompt in prompts for _ in beginnings]
    logits: list[torch.Tensor] = []
    starts = [0]
    for part in _parts_of(rows):
        found = _padded_logits(model, rows[part])
        for i, at in enumerate(range(part.start, part.stop)):
            logits.append(found[i, firsts[at] : len(rows[at])])
            starts.append(starts[-1] + len(logits[-1]))
    scored = []
    for i in range(len(prompts)):
        for candidate in candidates:
            start = starts[i * len(beginnings) + beginnings.index(tuple(candidate[:-1]))]
            scored.append([*range(start, start + len(candidate))])
    return torch.cat(logits), scored, sum(map(len, rows))


def _parts_of(rows: Sequence[list[int]]) -> list[slice]:
    """The rows in order, in parts of at most FORWARD_TOKENS with their padding, or of one row."""
    parts: list[slice] = []
    start = longest = 0
    for i, row in enumerate(rows):
        longest = max(longest, len(row))
        if i > start and longest * (i + 1 - start) > FORWARD_TOKENS:
            parts.append(slice(start, i))
            start, longest = i, len(row)
    return [*parts, slice(start, len(rows))]


def _padded_logits(model: Any, rows: Sequence[list[int]]) -> torch.Tensor:
    batch = pad([Document(row, [IGNORE] * len(row)) for row in rows])
    given = {key: batch[key].to(model.device) for key in ("input_ids", "attention_mask")}
    return model(**given, use_cache=False).logits
