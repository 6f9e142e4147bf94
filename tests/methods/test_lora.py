"""LoRA on a model: what attach, detach and active promise, and that PEFT agrees."""

import copy
import pickle

import pytest
import torch
from method_cases import ALL, IDS, quantized, shake
from torch import nn
from torch.utils.checkpoint import checkpoint

from peft_engine.methods import LoraConfig, active, adapters_without_gradient, attach, detach
from peft_engine.methods.attach import tensors
from peft_engine.methods.lora import LoraLinear, LoraNF4Linear
from peft_engine.nn import NF4Linear
from peft_engine.ops.lora_linear import LORA_LINEAR


def snapshot(model: nn.Module) -> tuple:
    """All that detach must bring back: classes, parameters' identity, bits and flags, buffers, attributes."""
    return (
        [(path, type(module)) for path, module in model.named_modules()],
        [(path, id(p), p.requires_grad) for path, p in model.named_parameters(remove_duplicate=False)],
        {key: value.clone() for key, value in model.state_dict().items()},
        {path: set(module.__dict__) for path, module in model.named_modules()},
    )


def assert_same(a: tuple, b: tuple) -> None:
    assert a[0] == b[0]
    assert a[1] == b[1]
    assert a[2].keys() == b[2].keys()
    assert all(torch.equal(a[2][key], b[2][key]) for key in a[2])
    assert a[3] == b[3]


CONFIGS = [
    ALL,
    LoraConfig(r=4, target_modules=["q_proj", "v_proj"], bias="all"),
    LoraConfig(r=4, target_modules="all-linear", bias="lora_only"),
    LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head", "norm"]),
    LoraConfig(r=4, target_modules="all-linear", use_dora=True, bias="lora_only"),
]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("nf4", [False, True])
def test_detach_leaves_the_model_bit_for_bit_as_before_attach(tiny_llama, config, nf4):
    model = tiny_llama(attention_bias=True, tie_word_embeddings=True)
    if nf4:
        model = quantized(model)
    before = snapshot(model)
    logits = model(IDS).logits
    attach(model, config)
    shake(model)
    assert not torch.equal(model(IDS).logits, logits)
    detach(model)
    assert_same(before, snapshot(model))
    assert torch.equal(model(IDS).logits, logits)


def test_attach_freezes_all_but_the_adapter_and_keeps_isinstance(tiny_llama):
    model = quantized(tiny_llama(torch.bfloat16))
    attach(model, ALL)
    trainable = {path for path, p in model.named_parameters() if p.requires_grad}
    assert trainable == {
        f"{path}.lora_{x}.default"
        for path, m in model.named_modules()
        if type(m) is LoraNF4Linear
        for x in "AB"
    }
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    assert all(isinstance(m, (NF4Linear, nn.Linear)) for m in model.modules() if hasattr(m, "lora_A"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_adapter_over_nf4_changes_no_bit(tiny_llama, backend, dtype):
    model = quantized(tiny_llama(dtype))
    inputs = (IDS, IDS[:1, :1])
    before = [model(ids).logits for ids in inputs]
    attach(model, ALL)
    assert all(torch.equal(model(ids).logits, logits) for ids, logits in zip(inputs, before, strict=True))


def test_a_fresh_adapter_over_dense_weights_changes_no_output(tiny_llama, backend):
    model = tiny_llama()
    before, exact = model(IDS).logits, copy.deepcopy(model).double()(IDS).logits
    after = attach(model, ALL)(IDS).logits
    if backend == "reference":
        assert torch.equal(after, before)
    # The kernel sums in another order than torch: its error against float64 is at most twice torch's.
    error, allowed = after.double() - exact, before.double() - exact
    ulp = torch.finfo(after.dtype).eps * exact.abs().max()
    assert error.abs().max() <= 2 * allowed.abs().max() + ulp and error.norm() <= 2 * allowed.norm() + ulp


@pytest.mark.peers
@pytest.mark.parametrize("init", [True, False, "gaussian"])
def test_a_seed_gives_the_adapter_that_peft_gives(tiny_llama, init):
    peft = pytest.importorskip("peft", reason="PEFT is not installed (the peers extra)")
    settings = dict(r=4, lora_alpha=10, target_modules="all-linear", init_lora_weights=init, use_rslora=True)
    settings["rank_pattern"] = {"up_proj": 3, r"layers.1.*q_proj": 2}
    settings["alpha_pattern"] = {"v_proj": 5}
    model = tiny_llama()
    theirs = copy.deepcopy(model)
    torch.manual_seed(7)
    attach(model, LoraConfig(**settings))
    torch.manual_seed(7)
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(**settings))
    expected = peft.get_peft_model_state_dict(theirs)
    got = {f"base_model.model.{path}": tensor for path, tensor in tensors(model, "default").items()}
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[key], expected[key]) for key in got)
    torch.testing.assert_close(model(IDS).logits, theirs(IDS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.peers
@pytest.mark.parametrize(
    "settings",
    [
        dict(target_modules=None),
        dict(target_modules="all-linear", exclude_modules=["q_proj", "layers.0.mlp.up_proj"]),
        dict(target_modules="all-linear", exclude_modules=r".*layers\.0.*"),
        dict(target_modules=["q_proj", "down_proj"], layers_to_transform=[1]),
        dict(target_modules=["q_proj"], layers_to_transform=0, layers_pattern="layers"),
        dict(target_modules=r"model\.layers\.\d\.(self_attn|mlp)\.(q|up)_proj"),
        dict(target_modules=["q_proj", "lm_head"]),
        dict(target_modules=["self_attn.q_proj"]),
        dict(target_modules=["q_proj", "model.layers.0.mlp.up_proj"], layers_to_transform=[1]),
        dict(target_modules="all-linear", modules_to_save=["q_proj"]),
    ],
)
def test_the_targets_are_those_peft_chooses(tiny_llama, settings):
    peft = pytest.importorskip("peft", reason="PEFT is not installed (the peers extra)")
    model = tiny_llama()
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, **settings))
    attach(model, LoraConfig(r=2, **settings))
    expected = {path for path, m in theirs.base_model.model.named_modules() if hasattr(m, "lora_A")}
    assert {path for path, m in model.named_modules() if isinstance(m, LoraLinear)} == expected


@pytest.mark.peers
def test_gradients_and_outputs_are_pefts(tiny_llama):
    peft = pytest.importorskip("peft", reason="PEFT is not installed (the peers extra)")
    settings = dict(r=4, target_modules="all-linear", init_lora_weights=False, bias="lora_only")
    model = tiny_llama(attention_bias=True)
    theirs = copy.deepcopy(model)
    torch.manual_seed(7)
    attach(model, LoraConfig(**settings))
    torch.manual_seed(7)
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(**settings))
    model(IDS, labels=IDS).loss.backward()
    theirs(IDS, labels=IDS).loss.backward()
    expected = {
        key.removeprefix("base_model.model.").replace(".base_layer", "").replace(".default", ""): p.grad
        for key, p in theirs.named_parameters()
        if p.requires_grad
    }
    got = {path: tensor.grad for path, tensor in tensors(model, "default").items()}
    assert got.keys() == expected.keys()
    for path in got:
        torch.testing.assert_close(got[path], expected[path], rtol=1e-4, atol=1e-6)


# --- several adapters ---------------------------------------------------------------------------------------


def three(model: nn.Module) -> nn.Module:
    """Adapters of different ranks, targets and kinds, each moved off its start."""
    attach(model, ALL, "a")
    attach(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]), "b")
    attach(model, LoraConfig(r=3, target_modules=["up_proj", "v_proj"], bias="all"), "c")
    for seed, name in enumerate("abc"):
        shake(model, name, seed)
    return model


def test_active_switches_at_once_and_with_restores(tiny_llama, backend):
    model = tiny_llama(attention_bias=True)
    base = model(IDS).logits
    three(model)
    outputs = {}
    for name in "abc":
        active(model, name)
        assert model.peft_engine_active == name
        outputs[name] = model(IDS).logits
    assert not torch.equal(outputs["a"], outputs["b"])
    with active(model, None):
        assert torch.equal(model(IDS).logits, base)
        with active(model, "a"):
            assert torch.equal(model(IDS).logits, outputs["a"])
    assert torch.equal(model(IDS).logits, outputs["c"])
    with pytest.raises(KeyError), active(model, None):
        raise KeyError
    assert model.peft_engine_active == "c"


def test_attach_freezes_the_adapters_before_it_and_active_frees_those_it_names(tiny_llama):
    def trainable(model):
        return {id(p) for p in model.parameters() if p.requires_grad}

    def parts(model, names):
        return {id(t) for name in names for t in tensors(model, name).values()}

    model = three(tiny_llama(attention_bias=True))
    assert trainable(model) == parts(model, "c")
    with active(model, ["a", None, "b"]):
        assert trainable(model) == parts(model, "abc")


def test_a_backward_after_the_switch_reaches_the_adapters_that_ran(tiny_llama):
    model = three(tiny_llama(attention_bias=True))
    with active(model, "a"):
        first = model(IDS, labels=IDS).loss
    with active(model, ["b", None, "b", "b"]):
        second = model(IDS, labels=IDS).loss
    with active(model, None):
        (first + second).backward()
    assert all(t.grad is not None for name in "ab" for t in tensors(model, name).values())
    assert all(t.grad is None for t in tensors(model, "c").values())


@pytest.mark.parametrize("nf4", [False, True])
def test_a_mixed_batch_gives_each_row_its_adapters_output_and_gradient(tiny_llama, nf4):
    names = ["b", None, "a", "b", "c", None, "a"]
    ids = torch.arange(42).view(7, 6)
    model = tiny_llama(attention_bias=True)
    model = three(quantized(model) if nf4 else model)
    alone = []
    for i, name in enumerate(names):
        with active(model, name):
            logits = model(ids[i : i + 1]).logits
            alone.append(logits.detach())
            if name is not None:
                logits.square().mean().backward()
    gradients = {(name, path): t.grad.clone() for name in "abc" for path, t in tensors(model, name).items()}
    model.zero_grad()
    with active(model, names):
        logits = model(ids).logits
        torch.testing.assert_close(logits, torch.cat(alone), rtol=1e-5, atol=1e-5)
        sum(row.square().mean() for row in logits).backward()
        for (name, path), gradient in gradients.items():
            torch.testing.assert_close(tensors(model, name)[path].grad, gradient, rtol=1e-4, atol=1e-6)


def test_a_mixed_batch_leaves_nothing_behind(tiny_llama):
    model = tiny_llama(attention_bias=True)
    before = snapshot(model)
    head = model.lm_head.weight
    three(model)
    with active(model, ["b", None, "a", "b"]):
        model(IDS)
        assert model.lm_head.weight is head
    assert "forward" not in model.lm_head.__dict__
    active(model, ["b", None, "a", "b"])
    model(IDS)
    detach(model)
    assert_same(before, snapshot(model))


def test_generate_expands_names_to_the_beams_of_each_prompt(tiny_llama):
    model = three(tiny_llama(attention_bias=True))
    settings = dict(max_new_tokens=5, num_beams=3, do_sample=False, pad_token_id=0)
    alone = []
    for row, name in ((0, "a"), (1, None), (2, "b")):
        with active(model, name):
            alone.append(model.generate(IDS[row : row + 1], **settings)[0])
    with active(model, ["a", None, "b"]):
        together = model.generate(IDS[:3], **settings)
    assert all(torch.equal(row[: len(one)], one) for row, one in zip(together, alone, strict=True))


def test_rows_that_the_names_do_not_divide_are_refused(tiny_llama):
    model = three(tiny_llama())
    with active(model, ["a", "b", None]), pytest.raises(ValueError, match=r"3 adapter names.*4 rows"):
        model(IDS)
    with pytest.raises(ValueError, match=r"no adapter 'd'.*'a', 'b', 'c'"):
        active(model, ["a", "d"])
    with pytest.raises(ValueError, match="empty"):
        active(model, [])
    with pytest.raises(TypeError, match="expected an adapter's name"):
        active(model, ["a", 5])


def test_detach_of_one_adapter_leaves_the_others(tiny_llama):
    model = tiny_llama(attention_bias=True)
    before = snapshot(model)
    three(model)
    with active(model, "a"):
        expected = model(IDS).logits
    detach(model, "c")
    assert model.peft_engine_active is None
    assert list(model.peft_engine_adapters) == ["a", "b"]
    detach(model, "b")
    with active(model, "a"):
        assert torch.equal(model(IDS).logits, expected)
    detach(model)
    assert_same(before, snapshot(model))
    with pytest.raises(ValueError, match="no adapter 'a'"):
        detach(model, "a")


def test_a_pickled_model_computes_the_same(tiny_llama):
    model = three(quantized(tiny_llama(attention_bias=True)))
    with active(model, ["a", None, "b", "c"]):
        twin = pickle.loads(pickle.dumps(model))
        assert torch.equal(twin(IDS).logits, model(IDS).logits)
    assert all(torch.equal(t, tensors(model, "b")[path]) for path, t in tensors(twin, "b").items())
    detach(twin)


def test_a_copy_of_the_model_has_adapters_of_its_own(tiny_llama):
    model = three(tiny_llama(attention_bias=True))
    twin = copy.deepcopy(model)
    expected = model(IDS).logits
    shake(twin, "c")
    detach(twin)
    assert torch.equal(model(IDS).logits, expected)


# --- training -----------------------------------------------------------------------------------------------


def layer(**settings) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 24))
    return attach(model, LoraConfig(r=4, target_modules=["0"], **settings))


def test_dropout_acts_in_training_only_and_a_seed_repeats_it():
    model = layer(lora_dropout=0.5, init_lora_weights=False)
    x = torch.randn(8, 32)
    torch.manual_seed(3)
    first = model(x)
    assert not torch.equal(model(x), first)
    torch.manual_seed(3)
    assert torch.equal(model(x), first)
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_drops_the_same_when_it_recomputes(reentrant):
    model = layer(lora_dropout=0.5, init_lora_weights=False)
    gradients = []
    for recompute in (False, True):
        x = torch.linspace(-1, 1, 8 * 32).view(8, 32).requires_grad_()
        torch.manual_seed(3)
        y = checkpoint(model, x, use_reentrant=reentrant) if recompute else model(x)
        y.square().sum().backward()
        gradients.append([x.grad, *(t.grad.clone() for t in tensors(model, "default").values())])
        model.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_layer_compiles_without_a_graph_break():
    for model in (layer(lora_dropout=0.3, init_lora_weights=False), layer(init_lora_weights=False)):
        x = torch.randn(8, 32, requires_grad=True)
        LORA_LINEAR._cache.clear()  # nothing has run yet
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        compiled(x).sum().backward()
        model.eval()
        torch.testing.assert_close(compiled(x), model(x))
        torch._dynamo.reset()


def test_a_mixed_batch_compiles_without_a_graph_break():
    model = layer(init_lora_weights=False)
    attach(model, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False), "b")
    active(model, ["b", None, "default", "b"])
    x = torch.randn(8, 32)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))
    torch._dynamo.reset()


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_model_has_the_gradients_of_a_plain_one(tiny_llama, reentrant):
    model = attach(tiny_llama(), LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.2)).train()
    shake(model)
    gradients = []
    for recompute in (False, True):
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(3)
        model(IDS, labels=IDS).loss.backward()
        gradients.append([t.grad.clone() for t in tensors(model, "default").values()])
        model.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_after_a_step_every_tensor_had_a_gradient_or_is_named(tiny_llama):
    model = attach(tiny_llama(), ALL)
    model(IDS, labels=IDS).loss.backward()
    assert adapters_without_gradient(model) == []
    detach(model)
    attach(model, ALL)
    hidden = model.model.layers[0](model.model.embed_tokens(IDS), position_embeddings=_positions(model))
    hidden.sum().backward()
    missing = adapters_without_gradient(model)
    assert len(missing) == 14  # A and B of seven layers
    assert all(path.startswith("model.layers.1.") for path in missing)


def test_a_gradient_of_nothing_but_zeros_counts_as_none(tiny_llama):
    model = attach(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    (0 * model(IDS).logits).sum().backward()
    missing = adapters_without_gradient(model)
    paths = [*(f"model.layers.{i}.self_attn.q_proj.lora_B.weight" for i in (0, 1)), "lm_head.weight"]
    assert missing == [f"{path} of 'default'" for path in paths]


def _positions(model):
    return model.model.rotary_emb(torch.zeros(1), torch.arange(IDS.shape[1])[None])


def test_under_autocast_the_layer_computes_in_its_dtype():
    model = layer(init_lora_weights=False)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(torch.randn(3, 32)).dtype == torch.bfloat16
