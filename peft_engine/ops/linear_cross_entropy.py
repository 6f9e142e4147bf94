"""Cross entropy of a linear layer's outputs, without ever holding all of them (the idea: Wijmans et al. 2024,
"Cut your losses", arXiv 2411.09009; here chunked by rows around library products).

    l_i = W x_i + b, with a softcap c: c tanh((W x_i + b) / c)
    loss_i = log sum_j exp(l_ij) - l_i,label(i)        for rows i with a label
    dl_i = (softmax(l_i) - onehot(label(i))) g_i, with a softcap times 1 - (l_i / c)^2
    dx = dl W        dW = dl^T x        db = sum_i dl_i

x (..., K), W (N, K), labels (...). Rows without a label are never computed. When x asks for a gradient, dx is
written in the forward, while a chunk's logits are there; all that is saved is that gradient, of x's shape.
"""

from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from peft_engine import dense, dispatch, native
from peft_engine.activations import empty_with_spare
from peft_engine.ops.nf4 import DTYPES, refuse_unless_cpu, refuse_unless_cuda

REDUCTIONS = ("mean", "sum", "none")


class LinearCrossEntropyCall(NamedTuple):
    """What dispatch needs to know of a call."""

    device: str
    dtype: torch.dtype


LINEAR_CROSS_ENTROPY = dispatch.Op("linear_cross_entropy")


def linear_cross_entropy(
    x: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    softcap: float | None = None,
) -> torch.Tensor:
    """F.cross_entropy(F.linear(x, weight, bias).float(), labels), of float32.

    x (..., K) float32, bfloat16 or float16; weight (N, K) and bias (N,) of x's dtype; labels (...), integers,
    already shifted: labels[i] belongs to x[i]. Rows whose label is ignore_index count for nothing.
    reduction: "mean" over the labelled rows (nan when there is none, as torch), "sum", or "none", of the
    shape of labels. softcap: above 0, logits go through softcap * tanh(logits / softcap) first, in x's dtype.
    Gradients flow to x, weight and bias.
    Raises ValueError or TypeError that says which argument does not fit, IndexError for a label that is no
    entry of the vocabulary.
    """
    if dispatch.in_autocast(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    _check(x, weight, labels, bias, reduction, softcap)
    labels = labels.long()  # before ignore_index is looked for: -100 in uint8 is 156
    run = LINEAR_CROSS_ENTROPY.choose(LinearCrossEntropyCall(x.device.type, x.dtype), x, weight, bias).run
    return run(x, weight, labels, bias, ignore_index, reduction, softcap)


def _check(x, weight, labels, bias, reduction, softcap) -> None:
    who = "linear_cross_entropy"
    if x.dtype not in DTYPES:
        raise TypeError(f"{who}: x must be float32, bfloat16 or float16, got {x.dtype}")
    if weight.dim() != 2:
        raise ValueError(f"{who}: weight must be (vocabulary, in_features), got {tuple(weight.shape)}")
    n, k = weight.shape
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(f"{who}: x must be (..., in_features)=(..., {k}), got {tuple(x.shape)}")
    if weight.dtype != x.dtype:
        raise TypeError(f"{who}: x is {x.dtype} and weight {weight.dtype}; cast one of them")
    if labels.shape != x.shape[:-1]:
        raise ValueError(
            f"{who}: labels must be {tuple(x.shape[:-1])}, one a row of x, got {tuple(labels.shape)}"
        )
    if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool:
        raise TypeError(f"{who}: labels must be integers, got {labels.dtype}")
    if bias is not None and (tuple(bias.shape) != (n,) or bias.dtype != x.dtype):
        raise ValueError(f"{who}: bias must be ({n},) of {x.dtype}, got {tuple(bias.shape)} of {bias.dtype}")
    for name, tensor in (("weight", weight), ("labels", labels), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{who}: x is on {x.device} and {name} on {tensor.device}; move one of them")
    if reduction not in REDUCTIONS:
        raise ValueError(f"{who}: reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"{who}: softcap must be a number above 0, or None, got {softcap}")


# --- reference ----------------------------------------------------------------------------------------------


def reference(
    x, weight, labels, bias=None, ignore_index=-100, reduction="mean", softcap=None
) -> torch.Tensor:
    """The definition in plain torch, as transformers computes it: logits in x's dtype, then float32."""
    logits = F.linear(x, weight, bias).reshape(-1, weight.shape[0])
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    if logits.dtype != torch.float64:
        logits = logits.float()
    loss = F.cross_entropy(logits, labels.reshape(-1), ignore_index=ignore_index, reduction=reduction)
    return loss.view(labels.shape) if reduction == "none" else loss


# --- kernels ------------------------------------------------------------------------------------------------

# The opaque op: everything whose size depends on the labels is inside it. `scale` multiplies each row's
# gradient: one value a row of x, or None for 1 / labelled rows (mean=True) or 1. What is not needed comes
# back empty.
native.library.define(
    "linear_cross_entropy(Tensor x, Tensor weight, Tensor? bias, Tensor labels, int ignore_index,"
    " float? softcap, Tensor? scale, bool mean, bool need_dx, bool need_dw, bool need_db)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
# The row passes in csrc/cpu/linear_cross_entropy.cpp and kernels/linear_cross_entropy/; never traced, so they
# need no fake.
native.library.define(
    "cross_entropy_rows(Tensor(a!) logits, Tensor labels, Tensor scale, Tensor(b!) loss, Tensor(c!) stats,"
    " bool write_gradient) -> ()"
)
native.library.define(
    "cross_entropy_columns(Tensor(a!) logits, Tensor labels, Tensor scale, Tensor stats, int first_column)"
    " -> ()"
)


@torch.library.register_fake("peft_engine::linear_cross_entropy")
def _(x, weight, bias, labels, ignore_index, softcap, scale, mean, need_dx, need_dw, need_db):
    return (
        x.new_empty(labels.shape, dtype=torch.float32),
        x.new_empty(x.shape if need_dx else (0,)),
        x.new_empty(weight.shape if need_dw else (0,)),
        x.new_empty(weight.shape[0] if need_db else 0),
    )


# Triton is imported when the first tensor on a GPU asks for it.
@torch.library.impl(native.library, "cross_entropy_rows", "CUDA")
def _rows_on_gpu(*arguments) -> None:
    from peft_engine.kernels.linear_cross_entropy.rows import cross_entropy_rows

    cross_entropy_rows(*arguments)


@torch.library.impl(native.library, "cross_entropy_columns", "CUDA")
def _columns_on_gpu(*arguments) -> None:
    from peft_engine.kernels.linear_cross_entropy.columns import cross_entropy_columns

    cross_entropy_columns(*arguments)


class Chunks(NamedTuple):
    """Bytes of logits held at a time, and the rows and columns below which a chunk does not pay."""

    nbytes: int
    rows: int
    columns: int

    def beside(self, weight: torch.Tensor) -> "Chunks":
        """With as many bytes as a quarter of a large weight's."""
        return self._replace(nbytes=max(self.nbytes, weight.nbytes // 4))

    def step(self, size: int, line_bytes: int, least: int) -> int:
        """Rows (or columns) at a time: within nbytes, a sixteenth of many, all chunks about the same.

        By fours, so that what belongs to a chunk starts at a multiple of 16 bytes: Triton compiles a kernel
        anew for other addresses.
        """
        most = max(1, min(self.nbytes // line_bytes, max(least, size // 16)))
        four = 4 if most >= 4 else 1
        even = -(-size // -(-size // (most // four * four)))
        return -(-even // four) * four


# Each chunk reads W once. On two cores of a Sapphire Rapids, bf16, vocabulary 49152, hidden 576, the two
# products take 500 us a row in chunks of 32 rows, 450 at 64, 270 at 128, 240 with all 512 at once. On
# two of a Zen 4, vocabulary 262144, hidden 640, 896 rows: in float32 5.7 s in chunks of 32, 4.5 at 64, 3.9 at
# 128, 3.6 at 224; in bfloat16 2.4 at 64, 2.0 at 128, 1.8 at 224. So a large weight has more beside it. On a
# GPU 1024 rows: dx is a product of few results and a long contraction, and with tiles of 128 by 256 those of
# 256 rows by 4096 are 32, on an H200's 132 multiprocessors. Reasoned, not measured on a GPU.
CHUNKS = {"cpu": Chunks(32 << 20, 128, 512), "cuda": Chunks(256 << 20, 1024, 512)}


class _Labelled(NamedTuple):
    """The rows that are computed: their x are x[at]; their labels and their gradients' factors.

    kept: of all rows, which have a label, where others are among those computed; else None.
    """

    x: torch.Tensor
    at: torch.Tensor
    labels: torch.Tensor
    scale: torch.Tensor
    kept: torch.Tensor | None = None


def _labelled(x, labels, ignore_index: int, vocabulary: int, scale, mean: bool) -> _Labelled:
    """The rows with a label; IndexError for one that is no entry of the vocabulary.

    How many they are the host must know, and waits for it. A CUDA graph that is being captured cannot: there
    all rows are computed, those without a label for nothing, and a label out of range gives a loss of nan.
    """
    kept = labels != ignore_index
    if scale is not None:
        scale = scale.reshape(-1).float()
    if dispatch.is_captured(x):
        count = kept.sum().float()
        scale = (1.0 / count if mean else torch.ones_like(count)).expand(len(x)) if scale is None else scale
        return _Labelled(
            x.masked_fill(~kept[:, None], 0.0), torch.arange(len(x), device=x.device),
            labels.masked_fill(~kept, 0), scale.masked_fill(~kept, 0.0), kept,
        )  # fmt: skip
    index = kept.nonzero().squeeze(1)
    picked, rows = labels[index], index.numel()
    if rows:
        low, high = (int(end) for end in torch.stack(picked.aminmax()).tolist())
        if low < 0 or high >= vocabulary:
            wrong = low if low < 0 else high
            raise IndexError(
                f"linear_cross_entropy: label {wrong} is outside the vocabulary, 0 to {vocabulary - 1}; "
                f"rows without a label must be ignore_index={ignore_index}"
            )
    if scale is None:
        one = 1.0 / max(rows, 1) if mean else 1.0
        return _Labelled(x, index, picked, x.new_full((rows,), one, dtype=torch.float32))
    return _Labelled(x, index, picked, scale[index])


def _kernel(x, weight, bias, labels, ignore_index, softcap, scale, mean, need_dx, need_dw, need_db):
    """Loss of every row (labels' shape, 0 where ignored), dx, dW and db; see the schema above."""
    vocabulary, k = weight.shape
    flat_x, flat_labels = x.reshape(labels.numel(), k), labels.reshape(-1)
    loss = x.new_zeros(flat_labels.numel(), dtype=torch.float32)
    dx = x.new_zeros(flat_x.shape if need_dx else (0,))
    dw = weight.new_zeros(weight.shape if need_dw else (0,))
    db = x.new_zeros(vocabulary if need_db else 0)
    rows = _labelled(flat_x, flat_labels, ignore_index, vocabulary, scale, mean)
    if len(rows.at):
        stats = loss.new_empty(len(rows.at), 2)
        _by_rows(rows, weight, bias, softcap, stats, loss, dx if need_dx else None)
        if need_dw or need_db:
            _by_columns(rows, weight, bias, softcap, stats, dw if need_dw else None, db)
        if rows.kept is not None:
            loss = loss.masked_fill(~rows.kept, 0.0)
    return loss.view(labels.shape), dx.view(x.shape) if need_dx else dx, dw, db


def _by_rows(rows: _Labelled, weight, bias, softcap, stats, loss, dx) -> None:
    """Loss and dx, a chunk of rows at a time."""
    chunks, count = CHUNKS[weight.device.type].beside(weight), len(rows.at)
    step = chunks.step(count, weight.shape[0] * weight.element_size(), chunks.rows)
    room = _room(step, weight)
    for start in range(0, count, step):
        chunk = slice(start, min(start + step, count))
        where = rows.at[chunk]
        part = _logits(rows.x[where], weight, bias, room)
        capped = None if softcap is None else _cap(part, softcap)
        chunk_loss = stats.new_empty(len(part))
        run = _rows_on_gpu if dispatch.direct(part) else torch.ops.peft_engine.cross_entropy_rows
        run(part, rows.labels[chunk], rows.scale[chunk], chunk_loss, stats[chunk], dx is not None)
        loss[where] = chunk_loss
        if dx is not None:
            _uncap(part, capped)
            dx[where] = dense.product_back(part, weight)
        del part, capped  # before the next chunk's is there


def _room(rows: int, weight) -> torch.Tensor | None:
    """Memory for the logits of every chunk of a GPU, where each row begins at 16 bytes and has room up to 16.

    Those of an odd vocabulary would be read and written by two bytes, by the product as by the row's kernel.
    """
    if not dispatch.on_gpu(weight):
        return None
    columns = weight.shape[0]
    return empty_with_spare(rows, columns, -columns % 8, weight.dtype, weight.device)


def _logits(x, weight, bias, room: torch.Tensor | None) -> torch.Tensor:
    if room is None:
        return dense.product(x, weight, bias)
    out = room[: len(x)]
    return torch.mm(x, weight.t(), out=out) if bias is None else torch.addmm(bias, x, weight.t(), out=out)


def _cap(logits: torch.Tensor, softcap: float) -> torch.Tensor:
    """softcap * tanh(logits / softcap) in place of logits; the tanh."""
    t = torch.tanh(logits / softcap)
    torch.mul(t, softcap, out=logits)
    return t


def _uncap(grad: torch.Tensor, t: torch.Tensor | None) -> None:
    """The gradient of logits in place of that of the capped ones; t: what _cap gave."""
    if t is not None:
        grad.mul_(torch.addcmul(t.new_ones(()), t, t, value=-1.0, out=t))


def _by_columns(rows: _Labelled, weight, bias, softcap, stats, dw, db) -> None:
    """dW and db, a range of the vocabulary at a time over all labelled rows: each entry is one sum.

    Summing over chunks of rows instead would need dW in float32, twice W; this costs the logits once more.
    """
    vocabulary, chunks = weight.shape[0], CHUNKS[weight.device.type]
    x = rows.x[rows.at]
    step = chunks.step(vocabulary, x.element_size() * len(x), chunks.columns)
    for start in range(0, vocabulary, step):
        columns = slice(start, min(start + step, vocabulary))
        part = dense.product(x, weight[columns], None if bias is None else bias[columns])
        capped = None if softcap is None else _cap(part, softcap)
        run = _columns_on_gpu if dispatch.direct(part) else torch.ops.peft_engine.cross_entropy_columns
        run(part, rows.labels, rows.scale, stats, start)
        _uncap(part, capped)
        if dw is not None:
            dense.weight_gradient(part, x, out=dw[columns])
        if len(db):
            db[columns] = part.sum(0, dtype=torch.float32).to(db.dtype)
        del part, capped


native.library.impl("linear_cross_entropy", _kernel, "CPU")
native.library.impl("linear_cross_entropy", _kernel, "CUDA")


class _LinearCrossEntropy(torch.autograd.Function):
    """Loss of every row, and for "mean" and "sum" their reduction.

    The gradient of x is that of every row times a number known only in the backward, so the forward can write
    it. So is that of W where the number is one for all rows, unless a sum of unscaled rows could leave
    float16's range. For "none", and in float16, the backward computes it, from x. In float16 the rows' share
    of a mean is taken in the backward, too: before the loss is scaled it would be lost in small numbers.
    """

    @staticmethod
    def forward(
        ctx: Any, x, weight, bias, labels, ignore_index, reduction, softcap, need_dx, need_dw, need_db
    ):
        half = x.dtype == torch.float16
        now = reduction != "none" and not half
        loss, dx, dw, db = torch.ops.peft_engine.linear_cross_entropy(
            x,
            weight,
            bias,
            labels,
            ignore_index,
            softcap,
            None,
            reduction == "mean" and not half,
            need_dx,
            need_dw and now,
            need_db and now,
        )
        later = not now and (need_dw or need_db)
        count = (labels != ignore_index).sum() if reduction == "mean" else None
        ctx.save_for_backward(
            dx, dw, db, labels,
            x if later else None, weight if later else None, bias if later else None, count if half else None,
        )  # fmt: skip
        ctx.settings = ignore_index, softcap, need_dx, need_dw, need_db
        if reduction == "none":
            return loss
        # In float64, which costs nothing here: elsewhere no rounding can add up over rows.
        total = loss.sum(dtype=torch.float64)
        if reduction == "mean":
            total = total / count
        return total.float()

    @staticmethod
    @dispatch.first_order
    def backward(ctx: Any, grad):
        dx, dw, db, labels, x, weight, bias, count = ctx.saved_tensors
        ignore_index, softcap, need_dx, need_dw, need_db = ctx.settings
        if count is not None:
            grad = grad / count.clamp(min=1)
        by_row = grad.expand(labels.shape)
        if x is not None:
            _, _, dw, db = torch.ops.peft_engine.linear_cross_entropy(
                x, weight, bias, labels, ignore_index, softcap, by_row.contiguous(), False, False, need_dw,
                need_db,
            )  # fmt: skip
        elif need_dw or need_db:
            dw, db = dw * grad, db * grad
        # By one number * makes no copy; by a row of float32, and on the CPU even into out=, it makes one of a
        # half-precision dx in float32 first.
        if need_dx and grad.dim() == 0 and not dispatch.on_gpu(dx):
            dx = dx * grad
        elif need_dx:
            dx = torch.mul(dx, by_row[..., None], out=torch.empty_like(dx))
        return (
            dx if need_dx else None,
            dw if need_dw else None,
            db if need_db else None,
            *(None,) * 7,
        )


def _kernels(x, weight, labels, bias, ignore_index, reduction, softcap) -> torch.Tensor:
    training = torch.is_grad_enabled()
    return _LinearCrossEntropy.apply(
        x, weight, bias, labels, ignore_index, reduction, softcap,
        training and x.requires_grad,
        training and weight.requires_grad,
        training and bias is not None and bias.requires_grad,
    )  # fmt: skip


LINEAR_CROSS_ENTROPY.register("triton", _kernels, refuse_unless_cuda)
LINEAR_CROSS_ENTROPY.register("cpu", _kernels, refuse_unless_cpu)
LINEAR_CROSS_ENTROPY.register("reference", reference)
