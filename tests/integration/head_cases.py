"""What the tests of the head joined with its loss share."""

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
