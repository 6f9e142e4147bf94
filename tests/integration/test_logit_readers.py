"""Who reads the logits of a head joined with its loss sees the true ones, formed when they are read."""

import copy
import io

import numpy as np
import pytest
import torch
from accelerate.utils import convert_outputs_to_fp32
from head_cases import VOCABULARY, Largest, batch, needs_kernels

from peft_engine.heads import causal_lm_loss
from peft_engine.lazy_logits import LazyLogits

pytestmark = needs_kernels


def test_reading_logits_twice_forms_them_once(head_pair):
    _, fused = head_pair()
    logits = fused(**batch()).logits
    with Largest() as seen:
        assert torch.equal(logits + 0, logits.float() * 1)
    products = [name for name, _ in seen.logits if "mm" in name]
    assert len(products) == 1


def test_without_labels_the_head_is_an_ordinary_linear_layer(head_pair):
    plain, fused = head_pair()
    ids = batch()["input_ids"]
    logits = fused(input_ids=ids).logits
    assert type(logits) is torch.Tensor and torch.equal(logits, plain(input_ids=ids).logits)
    fused(**batch())
    assert type(fused.lm_head(torch.ones(3, 64))) is torch.Tensor


READERS = {
    "arithmetic": lambda t: t * 2,
    "argmax": lambda t: t.argmax(-1),
    "log_softmax": lambda t: torch.nn.functional.log_softmax(t.float(), -1),
    "one position": lambda t: t[:, -1],
    "shift": lambda t: t[..., :-1, :].contiguous(),
    "all of it": lambda t: t[:, :] + 0,
    "gather": lambda t: t.gather(2, torch.zeros(2, 12, 1, dtype=torch.long)),
    "stack": lambda t: torch.stack([t, t]),
    "numpy": lambda t: torch.from_numpy(t.detach().numpy().copy()),
    "array": lambda t: torch.from_numpy(np.asarray(t.detach())),
    "tolist": lambda t: torch.tensor(t.tolist()),
    "item": lambda t: torch.tensor(t[0, 0, 0].item()),
    "iteration": lambda t: torch.cat(list(t)),
    "data": lambda t: t.data + 0,
    "clone": lambda t: t.clone(),
    "double": lambda t: t.to(torch.float64) + 0,
    "cpu": lambda t: t.cpu() + 0,
    "view": lambda t: t.view(-1, VOCABULARY) + 0,
    "reshape": lambda t: t.reshape((4, 6, VOCABULARY)) + 0,
    "view of a view": lambda t: t.view(-1, VOCABULARY).view(3, -1),
    "view as integers": lambda t: t.detach().view(torch.int32),
    "shared bias": lambda t: (t + torch.zeros(1, VOCABULARY)) * 1,
    "other bias": lambda t: t + torch.ones(2, 1, VOCABULARY),
    "number": lambda t: torch.add(t, 2, alpha=3),
    "transpose": lambda t: t.mT.contiguous(),
    "deepcopy": lambda t: copy.deepcopy(t.detach()),
    "repr": lambda t: torch.tensor(len(repr(t.detach()))),
    "data_ptr": lambda t: torch.tensor(float(t.data_ptr() != 0)),
    "comparison": lambda t: t == t,
    "out of a function": lambda t: torch.empty(t.shape).copy_(t.detach()),
}


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_sees_the_true_logits(head_pair, reader):
    plain, fused = head_pair()
    inputs = batch()
    want, got = READERS[reader](plain(**inputs).logits), READERS[reader](fused(**inputs).logits)
    assert type(got) is torch.Tensor
    assert torch.equal(got, want)


AFTER = {
    **{name: READERS[name] for name in ("argmax", "one position", "numpy", "cpu", "shared bias", "view")},
    "loss": lambda t: torch.nn.functional.cross_entropy(
        t.view(-1, VOCABULARY), torch.arange(t[..., 0].numel())
    ),
}


@pytest.mark.parametrize("reader", AFTER)
def test_logits_of_inference_mode_are_read_after_it(head_pair, reader):
    found, inputs = [], batch()
    for model in head_pair():
        with torch.inference_mode():
            logits = model(**inputs).logits
        found.append(AFTER[reader](logits))
    assert not found[1].requires_grad
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)


def test_a_loss_over_detached_logits_trains_nothing(head_pair):
    _, fused = head_pair()
    inputs = batch()
    logits = fused(**inputs).logits.detach()
    assert type(logits) is LazyLogits and not logits.requires_grad
    assert not causal_lm_loss(logits, inputs["labels"], VOCABULARY).requires_grad
    assert not (logits * 1).requires_grad


def test_logits_can_be_saved_and_loaded(head_pair):
    _, fused = head_pair()
    logits = fused(**batch()).logits
    file = io.BytesIO()
    torch.save(logits.detach(), file)
    file.seek(0)
    loaded = torch.load(file)
    assert type(loaded) is torch.Tensor and torch.equal(loaded, logits + 0)


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, t):
        return t * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


@pytest.mark.parametrize(
    "through",
    [lambda t: t, lambda t: t.float(), lambda t: t[:, :], Double.apply, lambda t: t.contiguous().float()],
    ids=["as it is", "float", "slice", "autograd.Function", "chain"],
)
def test_a_loss_of_ones_own_over_the_logits_has_the_true_gradients(head_pair, through):
    """As TRL does: outputs.logits is read and differentiated, beside the model's own loss."""
    plain, fused = head_pair()
    inputs = batch()
    for model in (plain, fused):
        output = model(**inputs)
        (output.loss + torch.logsumexp(through(output.logits), -1).mean()).backward()
    for (name, p), q in zip(plain.named_parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_logits_read_after_the_head_was_changed_are_an_error_not_other_logits(head_pair):
    _, fused = head_pair()
    output = fused(**batch())
    output.loss.backward()
    torch.optim.SGD(fused.parameters(), 0.1).step()
    with pytest.raises(RuntimeError, match="changed in place"):
        output.logits.sum()


def test_outputs_converted_to_float32_by_accelerate_keep_the_loss_without_logits(head_pair):
    plain, fused = head_pair(torch.bfloat16)
    inputs = batch()
    output = convert_outputs_to_fp32(fused.__call__)(**inputs)
    assert type(output.logits) is LazyLogits and output.logits.dtype == torch.float32
    assert torch.equal(output.logits + 0, plain(**inputs).logits.float())
    torch.testing.assert_close(output.loss, plain(**inputs).loss)


WRITERS = {
    "setitem": lambda t: t.__setitem__((..., slice(0, 9)), -5.0),
    "div_": lambda t: t.div_(3.0),
    "through a view": lambda t: t[0].fill_(0.5),
    "through a slice of all": lambda t: t[:, :].mul_(2.0),
    "out": lambda t: t.fill_(2.0) if t.requires_grad else torch.neg(torch.ones(t.shape).to(t.dtype), out=t),
    "init": torch.nn.init.zeros_,
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize("recorded", [True, False], ids=["in the graph", "under no_grad"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cast", [lambda t: t, torch.Tensor.float, torch.Tensor.detach])
def test_what_is_written_to_the_logits_is_there(head_pair, write, recorded, dtype, cast):
    found, inputs = [], batch()
    for model in head_pair(dtype):
        logits = cast(model(**inputs).logits)
        other = logits.detach()  # its alias
        early = logits.double()
        with torch.set_grad_enabled(recorded):
            write(logits)
        if logits.requires_grad:
            torch.logsumexp(logits, -1).sum().backward()
        grads = [torch.zeros(()) if p.grad is None else p.grad for p in model.parameters()]
        found.append([logits.detach() + 0, other + 0, early.detach(), *grads])
    for plain, fused in zip(*found, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-4 if dtype == torch.float32 else 2e-2, atol=1e-2)


def test_a_hook_that_masks_the_logits_in_place_changes_the_loss(head_pair):
    def mask(module, args, logits):
        logits[..., :9] = -5.0

    losses, inputs = [], batch()
    for model in head_pair():
        model.lm_head.register_forward_hook(mask)
        losses.append(model(**inputs).loss)
    torch.testing.assert_close(losses[1], losses[0])
    losses[1].backward()
