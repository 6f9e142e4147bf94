"""What the tests of the head joined with its loss share."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from peft_engine import native
from peft_engine.lazy_logits import LazyLogits

VOCABULARY = 101

needs_kernels = pytest.mark.skipif(native.load_error() is not None, reason=str(native.load_error()))


def batch(rows=2, tokens=12):
    ids = torch.randint(0, VOCABULARY, (rows, tokens))
    labels = ids.clone()
    labels[:, :3] = -100
    labels[0, 8:] = -100
    return {"input_ids": ids, "labels": labels}


def batch_of(seed):
    torch.manual_seed(seed)
    return batch()


class Largest(TorchDispatchMode):
    """The operations that returned a tensor whose last dimension is the vocabulary, and their shapes."""

    def __init__(self):
        super().__init__()
        self.logits = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if (
            isinstance(out, torch.Tensor)
            and type(out) is not LazyLogits
            and out.dim() > 1
            and out.shape[-1] == VOCABULARY
        ):
            self.logits.append((str(func), tuple(out.shape)))
        return out


def gradients(model, inputs):
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_equal_to_rounding(plain, fused, inputs, apart=None):
    """Errors against the model in float64: at most twice those of the plain model, plus one ulp.

    apart: words in the names of the parameters that are looked at one by one, all where it is None; the
    others' gradients are one vector, for in a small tensor whose gradients all but cancel rounding is luck.
    """
    exact_loss, exact = gradients(copy.deepcopy(plain).double(), inputs)
    want_loss, want = gradients(plain, inputs)
    loss, got = gradients(fused, inputs)
    assert got.keys() == want.keys() == exact.keys()
    for name in got:
        assert got[name].dtype == want[name].dtype, name
    if apart is not None:
        got, want, exact = (_joined(found, apart) for found in (got, want, exact))
    for name, g, r, truth in [
        ("loss", loss, want_loss, exact_loss),
        *((n, got[n], want[n], exact[n]) for n in want),
    ]:
        assert g.dtype == r.dtype, name
        ulp = torch.finfo(r.dtype).eps * truth.abs().max()
        for size in (lambda t: t.abs().max(), torch.linalg.vector_norm):
            assert size(g.double() - truth) <= 2 * size(r.double() - truth) + ulp, name


def _joined(found, apart):
    alone = {name: grad for name, grad in found.items() if any(word in name for word in apart)}
    rest = [grad.flatten() for name, grad in found.items() if name not in alone]
    return alone | ({"the others": torch.cat(rest)} if rest else {})
