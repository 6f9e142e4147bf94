"""Whether a model keeps documents apart that stand back to back in one row: found out by trying.

Most of transformers' models do, where position_ids restart and there is no attention mask. Some take no
position_ids, or mask by the place in the row alone (OPT, Bloom, Falcon, MPT, state-space models): these get
one document a row, with padding and an attention mask, and a line says so.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from peft_engine.train import encoder_decoder
from peft_engine.train.console import say as console_say
from peft_engine.train.data import IGNORE, Collate, Document, pack, pad

Say = Callable[[str], None]


def collator(model: Any, say: Say = console_say) -> Collate:
    """`pack` for a model that keeps packed documents apart; else what pads, and a line to `say` says why."""
    why = why_not_packed(model)
    if why is None:
        return pack
    say(f"Packing: off, one document a row with padding: {why}")
    return encoder_decoder.collate if encoder_decoder.is_one(model.config) else pad


def why_not_packed(model: Any) -> str | None:
    """Why documents cannot stand back to back in one row of this model; None: they can.

    Four forwards of a few tokens. Modes, random generators and adapters are left as they are.
    """
    kind = type(model).__name__
    if encoder_decoder.is_one(model.config):
        return f"{kind} has an encoder and a decoder"
    held = _tokens_of_a_held_mask(model)
    if held is not None:
        return f"{kind}'s attention holds a mask of {held} tokens, which a row of several documents exceeds"
    first, other, second = (probe_tokens(model, *span) for span in ((0, 4), (1, 4), (5, 6)))
    try:
        with undisturbed(model):
            packed = [_logits(model, pack([document, second]))[0, 4:] for document in (first, other)]
            padded = [_logits(model, pad([document, second]))[1] for document in (first, other)]
    except Exception as error:  # whatever a model's own code raises
        return failed(kind, "packed documents", error)
    return why_not_apart(model, "documents", packed, padded)


def why_no_decoder(model: Any) -> str | None:
    """Why a model writes no text; None: it does, or its forward fails, which its use will tell of.

    Two forwards of four tokens that differ in the last; of one with an encoder too, its head and its start.
    """
    kind = type(model).__name__
    if encoder_decoder.is_one(model.config):
        if getattr(model.config, "decoder_start_token_id", None) is None:
            return "config.json has no decoder_start_token_id, with which its decoder begins"
        return f"{kind} has no output head" if model.get_output_embeddings() is None else None
    first, other = (probe_tokens(model, start, 4).input_ids for start in (0, 1))
    try:
        with undisturbed(model):
            rows = [torch.tensor([first[:3] + last], device=model.device) for last in (first[3:], other[3:])]
            found: list[Any] = [getattr(model(input_ids=row), "logits", None) for row in rows]
    except Exception:  # whatever a model's own code raises
        return None
    if found[0] is None or found[0].shape[:-1] != rows[0].shape:
        return f"{kind} has no logits for each token"
    if _distance(found[0][0, :3], found[1][0, :3]) > 1e-3:
        return f"a token of {kind} sees those behind it, as in an encoder"
    return None


def why_not_apart(
    model: Any, what: str, together: list[torch.Tensor], apart: list[torch.Tensor]
) -> str | None:
    """Why what stands in one row is not what it is alone; None: it is.

    The logits of the same tokens, twice each: beside them in the batch, something changes. In rows of their
    own they move by rounding alone (a mixture of experts groups tokens of the whole batch), so in one row
    they may move by no more; and the two may differ by the rounding of products of other shapes.
    """
    rounding = max(torch.finfo(dtype).eps for dtype in (together[0].dtype, model.dtype))
    where = f"{what} in one row of {type(model).__name__}"
    if _distance(*together) > 1e-4 + 4 * _distance(*apart):
        return f"{where} see each other"
    if _distance(together[0], apart[0]) > max(1e-3, 16 * rounding):
        return f"{where} differ from what they are alone"
    return None


def probe_tokens(model: Any, start: int, count: int) -> Document:
    """A document of tokens from all over the vocabulary; at another start, each of its tokens is another."""
    size = model.get_input_embeddings().weight.shape[0]
    avoid = getattr(model.config.get_text_config(), "pad_token_id", None)
    ids = [(2 + (start + i) * max(1, size // 17)) % size for i in range(count)]
    ids = [(i + 1) % size if i == avoid else i for i in ids]
    return Document(ids, [IGNORE, *ids[1:]])


@contextlib.contextmanager
def undisturbed(model: Any) -> Iterator[None]:
    """Eval mode without gradients; each module's mode and torch's random generators are put back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            yield
    finally:
        for module in training:
            module.training = True


def failed(kind: str, on: str, error: Exception) -> str:
    """The reason for a forward that raises, in one line."""
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"{kind}'s forward of {on} fails: {first}"


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference of logits, as a part of the largest."""
    a, b = a.float(), b.float()
    real = (a.abs() < 1e6) & (b.abs() < 1e6)  # not NaN, and not what stands for a token that never comes
    a, b = a[real], b[real]
    return float((a - b).abs().max() / a.abs().max().clamp_min(1e-30)) if a.numel() else 0.0


def _logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    batch = {key: value.to(model.device) for key, value in batch.items()}
    return model(**batch, use_cache=False).logits


def _tokens_of_a_held_mask(model: Any) -> int | None:
    """The side of the causal mask that an attention layer holds as a buffer and cuts all from (GPT-Neo's)."""
    for module in model.modules():
        if "Attention" in type(module).__name__:
            for buffer in module.buffers(recurse=False):
                if buffer.dim() == 4 and buffer.shape[-1] == buffer.shape[-2] > 1:
                    return buffer.shape[-1]
    return None
