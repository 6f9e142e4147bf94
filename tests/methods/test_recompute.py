"""Activations that are made again in the backward and not kept: how many, and with the same bits."""

import gc
import io

import pytest
import torch
from families import build, inputs
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import peft_engine as pe
from peft_engine import native, recompute
from peft_engine.ops.lora_linear import lora_linear
from peft_engine.ops.rms_norm import rms_norm
from peft_engine.ops.swiglu import swiglu

pytestmark = pytest.mark.skipif(native.load_error() is not None, reason=str(native.load_error()))
FAMILIES = ("llama", "gpt2", "bert", "t5", "bart")
DTYPES = (torch.float32, torch.bfloat16)


def model_of(family: str, dtype: torch.dtype = torch.float32, nf4: bool = False):
    model = build(family, dtype=dtype, **({"feed_forward_proj": "gated-gelu"} if family == "t5" else {}))
    if nf4:
        pe.quantize_(model)
    pe.attach(model, pe.LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False))
    pe.optimize(model)
    return model.train()


def gradients(model, batch) -> list[torch.Tensor]:
    model.zero_grad()
    model(**batch).loss.backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


class Made(TorchDispatchMode):
    """The memory of all that is made inside, without holding it."""

    def __init__(self):
        super().__init__()
        self.found: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        out = function(*arguments, **keywords or {})
        for t in pytree.tree_leaves(out):
            if isinstance(t, torch.Tensor):
                memory = t.untyped_storage()
                self.found[memory._cdata] = StorageWeakRef(memory), memory.nbytes()
        return out

    def alive(self) -> int:
        """Its bytes that are still there."""
        return sum(size for memory, size in self.found.values() if not memory.expired())


def kept_bytes(model, batch) -> int:
    """What a forward leaves behind for the backward."""
    with Made() as made:
        loss = model(**batch).loss
    gc.collect()
    for t in (*model.parameters(), *model.buffers()):  # views of them are made, too
        made.found.pop(t.untyped_storage()._cdata, None)
    size = made.alive()
    loss.backward()
    return size


@pytest.fixture
def keeping(monkeypatch):
    """A switch: afterwards every activation is kept."""
    return lambda: monkeypatch.setattr(recompute, "instead_of", lambda x: (None, (x,)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_have_the_bits_of_those_from_kept_activations(family, dtype, keeping):
    model, batch = model_of(family, dtype), inputs(family)
    got = gradients(model, batch)
    keeping()
    want = gradients(model, batch)
    assert len(got) == len(want) and all(map(torch.equal, got, want))


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_of_norms_and_gated_products_are_not_kept(family, keeping):
    model, batch = model_of(family), inputs(family, tokens=9)
    less = kept_bytes(model, batch)
    keeping()
    more = kept_bytes(model, batch)
    # The outputs of both norms of each of the two layers, but of the first, which has no gradient to pass on,
    # and those of the gated products or activations. Decoders of T5 and BART have fewer tokens, more norms.
    width = 2 * (2 * 32 + (128 if family == "gpt2" else 48)) - 32
    assert more - less >= 4 * 9 * width * torch.float32.itemsize


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "bart"])
def test_with_checkpointing_gradients_are_the_same_and_nothing_is_held(
    family, reentrant, keeping, monkeypatch
):
    model, batch = model_of(family), inputs(family)
    want = gradients(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    for one, other in zip(gradients(model, batch), want, strict=True):  # in another order of additions
        torch.testing.assert_close(one, other)
    with_marks = kept_bytes(model, batch)
    keeping()
    monkeypatch.setattr(recompute, "made_by", lambda y, run, *saved, weights=(): y)
    assert with_marks <= kept_bytes(model, batch)


@pytest.mark.parametrize("family", FAMILIES)
def test_with_checkpointing_and_hooks_that_move_what_is_saved(family):
    model, batch = model_of(family), inputs(family)
    want = gradients(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t):
        assert all(map(torch.equal, gradients(model, batch), want))


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_nothing_made_again_is_alive_after_the_backward(family, checkpointed, keeping):
    def left(model) -> int:
        with Made() as made:
            loss = model(**batch).loss
            loss.backward()
        model.zero_grad()
        gc.collect()
        assert loss.grad_fn is not None  # the graph, and so what lies in it, is there
        return made.alive()

    model, batch = model_of(family), inputs(family)
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    found = left(model)
    keeping()
    assert found <= left(model)


def test_a_layer_that_the_loss_leaves_out_keeps_nothing_alive():
    x, norm = torch.randn(500, 32, requires_grad=True), torch.randn(32)
    y = rms_norm(x, norm)
    outs = [lora_linear(y, *lora(i), 1.0) for i in range(3)]
    del y
    loss = sum(out.sum() for out in outs[:2])
    with Made() as made:
        loss.backward()
    again = [size for memory, size in made.found.values() if size == x.nbytes and not memory.expired()]
    assert again == [x.nbytes]  # x's gradient


@pytest.mark.parametrize("family", ["llama", "bert", "bart"])
def test_fully_shard_frees_the_weights_of_a_norm_before_its_readers_go_backward(family, tmp_path):
    model, batch = model_of(family), inputs(family)
    want = gradients(model, batch)
    distributed.init_process_group("gloo", f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        for module in list(model.modules()):
            if type(module).__name__.endswith(("DecoderLayer", "EncoderLayer", "BertLayer")):
                fully_shard(module)
        fully_shard(model)
        model.zero_grad()
        model(**batch).loss.backward()
        got = [p.grad.full_tensor() for p in model.parameters() if p.grad is not None]
    finally:
        distributed.destroy_process_group()
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other)


def lora(seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    weight, a, b = (torch.randn(s, generator=g) for s in ((24, 32), (4, 32), (24, 4)))
    return weight, a.requires_grad_(), b.requires_grad_()


def test_a_graph_is_gone_through_twice_and_by_one_layer_alone():
    x, norm = torch.randn(5, 32, requires_grad=True), torch.randn(32)
    y = rms_norm(x, norm)
    weight, a, b = lora()
    weight2, a2, b2 = lora(1)
    out, out2 = lora_linear(y, weight, a, b, 1.0), lora_linear(y, weight2, a2, b2, 1.0)
    alone = torch.autograd.grad(out.sum(), a, retain_graph=True)[0]
    first = torch.autograd.grad((out + out2).sum(), [a, a2, x], retain_graph=True)
    second = torch.autograd.grad((out + out2).sum(), [a, a2, x])
    assert torch.equal(alone, first[0]) and all(map(torch.equal, first, second))
    kept = y.detach().clone()
    want = torch.autograd.grad(lora_linear(kept, weight, a, b, 1.0).sum(), a)[0]
    assert torch.equal(want, alone)


def make_norm():
    x = torch.randn(6, 32, requires_grad=True) * 1.0
    return rms_norm(x, torch.randn(32)), x


def make_product():
    gate, up = torch.randn(6, 32, requires_grad=True) * 1.0, torch.randn(6, 32)
    return swiglu(gate, up), gate


@pytest.mark.parametrize("make", [make_norm, make_product])
@pytest.mark.parametrize(
    "change",
    [
        lambda y: y.mul_(2.0),
        lambda y: y[:, :].add_(1.0),
        lambda y: y[2:],
        lambda y: y.view(2, 3, 32).transpose(0, 1),
        lambda y: y[:, None].expand(6, 2, 32),
        lambda y: y * 1.0,
        lambda y: y.detach(),
        lambda y: y.view(2, 3, 32),
        lambda y: y.view(3, 2, 32)[:, :, :],
    ],
)
def test_what_was_changed_since_or_is_a_part_has_its_own_gradient(make, change):
    y, _ = make()
    taken = change(y)
    weight, a, b = lora()
    got = torch.autograd.grad(lora_linear(taken, weight, a, b, 0.5).sum(), a)[0]
    want = torch.autograd.grad(lora_linear(taken.detach().clone(), weight, a, b, 0.5).sum(), a)[0]
    assert torch.equal(got, want)


@pytest.mark.parametrize("make", [make_norm, make_product])
def test_what_it_is_made_of_may_be_written_to_before_the_layer_reads_it(make):
    y, source = make()
    with torch.no_grad():
        source.add_(1.0)  # y's own backward would raise; dA alone asks for y
    weight, a, b = lora()
    got = torch.autograd.grad(lora_linear(y, weight, a, b, 0.5).sum(), a)[0]
    want = torch.autograd.grad(lora_linear(y.detach().clone(), weight, a, b, 0.5).sum(), a)[0]
    assert torch.equal(got, want)


@pytest.mark.parametrize("make", [make_norm, make_product])
def test_what_it_is_made_of_is_not_written_to_afterwards(make):
    y, source = make()
    weight, a, b = lora()
    out = lora_linear(y, weight, a, b, 0.5)
    with torch.no_grad():
        source.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out.sum(), a)


def test_nothing_is_marked_without_a_gradient_and_a_mark_is_not_saved_to_files():
    x, norm = torch.randn(5, 32), torch.randn(32)
    weight, *_ = lora()
    assert recompute.instead_of(rms_norm(x, norm))[0] is None
    with torch.no_grad():
        assert recompute.instead_of(rms_norm(x.requires_grad_(), norm))[0] is None
    y = rms_norm(x, norm)
    file = io.BytesIO()
    torch.save(y, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True), y)
    assert recompute.instead_of(y)[0] is not None
    assert recompute.instead_of(y.detach())[0] is None and recompute.instead_of(y.data)[0] is None
    assert F.linear(y, weight).shape == (5, 24)


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_under_autocast_the_layers_learn_as_from_kept_activations(family, keeping):
    model, batch = model_of(family), inputs(family)
    with torch.autocast("cpu", torch.bfloat16):
        got = gradients(model, batch)
        keeping()
        want = gradients(model, batch)
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_torchs_own_layers_are_traced_in_one_graph(family):
    torch._dynamo.reset()
    model = model_of(family)
    layer = model.transformer.h[0] if family == "gpt2" else model.base_model.encoder.layer[0]
    hidden = torch.randn(2, 7, 32, requires_grad=True)

    def run(f):
        out = f(hidden)
        out = out[0] if isinstance(out, tuple) else out
        found = [p for p in layer.parameters() if p.requires_grad]
        return [out.detach(), *torch.autograd.grad(out.square().mean(), found)]

    want = run(layer)
    got = run(torch.compile(layer, fullgraph=True, backend="aot_eager"))
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other)
