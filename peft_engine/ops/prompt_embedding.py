"""Trained prompt before embedded tokens: prompt tuning.

Lester et al. 2021, arXiv 2104.08691.

    y[b] = [prompt ; E[ids[b]]]           dprompt = sum over b of dy[b, :P]           dE[id] += dy[b, P + t]

ids (B, T), E (V, H), prompt (P, H), y (B, P + T, H). Nothing is saved but the ids, and those only for dE.

There is no kernel below plain torch: y is filled by one gather over [0 .. 0 | ids], which runs on every
thread, and the prompt is written over the first P rows. Least times on 2 Zen 3 cores, bf16, beside a copy
(y.clone(), whose source is warm, while the table's rows are not) and a cat behind an embedding:
4 x (20 + 128) x 576 74 us, copy 31, cat 93; 64 x (20 + 128) x 576 1.13 ms, copy 0.65, cat 1.81;
8 x (20 + 512) x 2048 1.60 ms, copy 0.96, cat 2.72.
"""

from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from peft_engine import dispatch
from peft_engine.ops.nf4 import DTYPES

IGNORED = -100  # the label of a position that counts for no loss


class PromptEmbeddingCall(NamedTuple):
    """What dispatch needs to know of a call."""

    device: str
    dtype: torch.dtype
    prompt: torch.dtype


PROMPT_EMBEDDING = dispatch.Op("prompt_embedding")


def prompt_embedding(input_ids: torch.Tensor, embedding: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
    """[prompt ; embedding[input_ids]], of shape (B, P + T, H) and the embedding's dtype.

    input_ids int64 or int32 (B, T), T may be 0; embedding (V, H) float32, bfloat16 or float16; prompt (P, H)
    of its dtype or float32, rounded when written. Gradients flow to prompt, summed over the batch in float32,
    and to an embedding that requires one.
    Raises ValueError or TypeError that says which argument does not fit, and IndexError (on the CPU) that
    names an id outside the vocabulary.
    """
    _check(input_ids, embedding, prompt)
    call = PromptEmbeddingCall(input_ids.device.type, embedding.dtype, prompt.dtype)
    return PROMPT_EMBEDDING.choose(call, embedding, prompt).run(input_ids, embedding, prompt)


def _check(input_ids, embedding, prompt) -> None:
    if input_ids.dtype not in (torch.int64, torch.int32) or input_ids.dim() != 2:
        raise ValueError(
            f"prompt_embedding: input_ids must be int64 or int32 (batch, tokens), got {input_ids.dtype} "
            f"{tuple(input_ids.shape)}"
        )
    if embedding.dim() != 2 or 0 in embedding.shape:
        raise ValueError(
            f"prompt_embedding: embedding must be (vocabulary, features), got {tuple(embedding.shape)}"
        )
    if embedding.dtype not in DTYPES or prompt.dtype not in (embedding.dtype, torch.float32):
        raise TypeError(
            "prompt_embedding: embedding must be float32, bfloat16 or float16 and prompt of its dtype or "
            f"float32, got {embedding.dtype} and {prompt.dtype}; cast one of them"
        )
    if prompt.dim() != 2 or prompt.shape[1] != embedding.shape[1]:
        raise ValueError(
            f"prompt_embedding: prompt must be (length, features)=(length, {embedding.shape[1]}) as the "
            f"embedding {tuple(embedding.shape)}, got {tuple(prompt.shape)}; "
            "was it trained for another model?"
        )
    for name, t in (("input_ids", input_ids), ("prompt", prompt)):
        if t.device != embedding.device:
            raise ValueError(
                f"prompt_embedding: embedding is on {embedding.device} and {name} on {t.device}; "
                "move one of them"
            )


def extend_inputs(
    prompt_length: int,
    *,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    token_type_ids: torch.Tensor | None = None,
    is_causal: bool = True,
) -> dict[str, torch.Tensor]:
    """What a model takes beside its embeddings, for a prompt of that length before them; keys as given.

    attention_mask (B, T): every token sees the prompt. (B, heads or 1, T, T), bool or added to the scores: so
    does every row; a row of the prompt sees the prompt up to itself, or, unless is_causal, all of it and
    whatever any row of the mask sees. position_ids (B, T): the prompt is at 0 .. P - 1, the rest P further.
    labels (B, T): -100. token_type_ids (B, T): 0.
    """
    given = {
        "attention_mask": attention_mask,
        "position_ids": position_ids,
        "labels": labels,
        "token_type_ids": token_type_ids,
    }
    out: dict[str, torch.Tensor] = {}
    for name, t in given.items():
        if t is None:
            continue
        if name == "attention_mask" and t.dim() == 4 and t.shape[-2] == t.shape[-1]:
            out[name] = _extend_square(t, prompt_length, is_causal)
        elif t.dim() != 2:
            either = " or (batch, heads, tokens, tokens)" if name == "attention_mask" else ""
            raise ValueError(f"extend_inputs: {name} must be (batch, tokens){either}, got {tuple(t.shape)}")
        elif name == "position_ids":
            prompt = torch.arange(prompt_length, dtype=t.dtype, device=t.device)
            out[name] = torch.cat([prompt.expand(t.shape[0], -1), t + prompt_length], dim=1)
        else:
            value = {"attention_mask": 1, "labels": IGNORED, "token_type_ids": 0}[name]
            out[name] = torch.cat([t.new_full((t.shape[0], prompt_length), value), t], dim=1)
    return out


def _extend_square(mask: torch.Tensor, prompt_length: int, is_causal: bool) -> torch.Tensor:
    """A mask with a row for every query: bool, True where it sees; or added to the scores."""
    batch, heads, rows, columns = mask.shape
    p = prompt_length
    added = mask.dtype.is_floating_point
    sees, hidden = (0.0, torch.finfo(mask.dtype).min) if added else (1, 0)
    wide = mask.new_full((batch, heads, p + rows, p + columns), sees)
    wide[..., p:, p:] = mask
    if is_causal:
        later = torch.ones(p, p + columns, dtype=torch.bool, device=mask.device).triu(1)
        wide[..., :p, :] = wide[..., :p, :].masked_fill(later, hidden)
    elif rows > 0:
        wide[..., :p, p:] = mask.amax(-2, keepdim=True) if added else mask.any(-2, keepdim=True)
    return wide


# --- the one backend ----------------------------------------------------------------------------------------


def reference(input_ids: torch.Tensor, embedding: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
    """prompt_embedding with y written once, by autograd where a gradient is asked for."""
    if torch.is_grad_enabled() and (prompt.requires_grad or embedding.requires_grad):
        return _PromptEmbedding.apply(input_ids, embedding, prompt)
    return _write(input_ids, embedding, prompt)


def _write(input_ids: torch.Tensor, embedding: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
    (batch, tokens), (length, features) = input_ids.shape, prompt.shape
    y = embedding.new_empty(batch, length + tokens, features)
    # The prompt's places take row 0, which is at hand after the first; it saves the copy that cat makes.
    ids = F.pad(input_ids, (length, 0)).view(-1)
    try:
        torch.index_select(embedding, 0, ids, out=y.view(-1, features))
    except IndexError as error:
        beyond = input_ids[(input_ids < 0) | (input_ids >= embedding.shape[0])]
        raise IndexError(
            f"prompt_embedding: id {int(beyond[0])} is outside the vocabulary of {embedding.shape[0]}; does "
            "the tokenizer belong to this model?"
        ) from error
    y[:, :length] = prompt
    return y


class _PromptEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input_ids, embedding, prompt):
        ctx.save_for_backward(input_ids if ctx.needs_input_grad[1] else None)
        ctx.prompt, ctx.vocabulary = (prompt.shape[0], prompt.dtype), embedding.shape[0]
        return _write(input_ids, embedding, prompt)

    @staticmethod
    @dispatch.first_order
    def backward(ctx: Any, dy):
        (input_ids,) = ctx.saved_tensors
        length, dtype = ctx.prompt
        dembedding = dprompt = None
        if ctx.needs_input_grad[1]:
            tokens = dy[:, length:].contiguous()
            dembedding = torch.ops.aten.embedding_dense_backward(tokens, input_ids, ctx.vocabulary, -1, False)
        if ctx.needs_input_grad[2]:
            wide = torch.float64 if dy.dtype == torch.float64 else torch.float32
            dprompt = dy[:, :length].sum(0, dtype=wide).to(dtype)
        return None, dembedding, dprompt


PROMPT_EMBEDDING.register("reference", reference)
