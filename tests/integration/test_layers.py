"""Fused layers in models of each family against its own code: outputs, gradients, generation, packing."""

import copy
import pickle

import pytest
import torch
import transformers
from accuracy import assert_twice_as_good

from peft_engine import dispatch, explain, layers

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 61,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES = {
    "Llama": {},
    "Mistral": {"sliding_window": 6},
    "Qwen2": {},
    "Qwen3": {"head_dim": 16},
    "Gemma": {"head_dim": 16},
    "Gemma3": {"head_dim": 16, "sliding_window": 6},
    "Phi3": {"partial_rotary_factor": 0.5},
    "SmolLM3": {"no_rope_layers": [1, 0]},
    "Granite": {"attention_multiplier": 0.3},
}
NATIVE = dispatch.available_backends()["cpu"] is None


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def make(family="Llama", dtype=torch.float32, **changes):
    torch.manual_seed(0)
    config_class = "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config"
    config = getattr(transformers, config_class)(**(SIZES | FAMILIES[family] | changes))
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for parameter in model.parameters():  # norms and biases are all ones and zeros otherwise
        torch.nn.init.normal_(parameter, 0.0 if parameter.dim() == 2 else 0.7, 0.1)
    return model.to(dtype).eval()


def fuse(model):
    """Sets the class of every layer that has a fused one; returns the ops put in."""
    ops = []
    for module in model.modules():
        fused, op, _ = layers.fused_class(module)
        if fused is not None:
            module.__class__ = fused
            ops.append(op)
    return ops


def run(model, ids, **arguments):
    """Logits, and the gradients of all parameters for a loss that touches all logits that are not padding."""
    logits = model(input_ids=ids, **arguments).logits
    keep = arguments.get("attention_mask", torch.ones_like(ids)).bool()
    logits = logits * keep[..., None]
    loss = logits.double().sin().sum()
    model.zero_grad()
    loss.backward()
    return logits.detach(), [p.grad.clone() for p in model.parameters()]


def check(family, dtype, ids, **arguments):
    """By the rule of twice the own error, on the logits and on all gradients as one vector: through a model
    the errors of single tensors are a draw of rounding, and one in many is above twice another."""
    plain, fused = make(family, dtype), make(family, dtype)
    exact = copy.deepcopy(plain).double()
    assert set(fuse(fused)) - {""} == {"rms_norm", "swiglu", "attention"}  # "": the GELU in Gemma's MLP
    results = [run(model, ids, **arguments) for model in (fused, plain, exact)]
    assert_twice_as_good(*(logits for logits, _ in results), what=f"{family} logits")
    gradients = (torch.cat([t.flatten() for t in grads]) for _, grads in results)
    assert_twice_as_good(*gradients, what=f"{family} gradients")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_and_gradients_are_within_twice_the_own_error(backend, family, dtype):
    check(family, dtype, torch.randint(3, 61, (2, 17)))


def test_packed_documents_are_within_twice_the_own_error(backend, family):
    positions = torch.cat([torch.arange(n) for n in (3, 9, 1, 14)])[None]
    check(family, torch.float32, torch.randint(3, 61, (1, 27)), position_ids=positions, use_cache=False)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_within_twice_the_own_error(backend, family, side):
    ids, mask = torch.randint(3, 61, (2, 11)), torch.ones(2, 11, dtype=torch.long)
    mask[0, slice(0, 4) if side == "left" else slice(7, 11)] = 0
    check(family, torch.float32, ids, attention_mask=mask)


def test_packed_equals_unpacked(family):
    model = make(family)
    fuse(model)
    documents = [torch.randint(3, 61, (1, n)) for n in (5, 12, 1, 8)]
    positions = torch.cat([torch.arange(d.shape[1]) for d in documents])[None]
    with torch.no_grad():
        together = model(torch.cat(documents, 1), position_ids=positions, use_cache=False).logits
        alone = torch.cat([model(d, use_cache=False).logits for d in documents], 1)
    torch.testing.assert_close(together, alone)


def test_documents_of_a_packed_row_do_not_see_each_other():
    model = make()
    fuse(model)
    ids = torch.randint(3, 61, (1, 20))
    positions = torch.cat((torch.arange(8), torch.arange(12)))[None]
    other = ids.clone()
    other[:, :8] = 3 + (ids[:, :8] - 2) % 58
    with torch.no_grad():
        a, b = (model(i, position_ids=positions, use_cache=False).logits[:, 8:] for i in (ids, other))
    assert torch.equal(a, b)


@pytest.mark.parametrize("cache", ["dynamic", "static", None])
def test_generated_tokens_are_the_own_ones(family, cache):
    plain, fused = make(family), make(family)
    fuse(fused)
    ids, mask = torch.randint(3, 61, (3, 9)), torch.ones(3, 9, dtype=torch.long)
    mask[0, :5] = 0
    mask[1, :1] = 0
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "disable_compile": True}
    settings |= {"use_cache": False} if cache is None else {"cache_implementation": cache}
    for inputs in ({"input_ids": ids, "attention_mask": mask}, {"input_ids": ids[2:]}):
        want, got = plain.generate(**inputs, **settings), fused.generate(**inputs, **settings)
        assert torch.equal(got, want)


def test_a_left_padded_prompt_generates_what_it_generates_alone():
    model = make()
    fuse(model)
    prompt = torch.randint(3, 61, (1, 5))
    padded = torch.cat((torch.zeros(1, 4, dtype=torch.long), prompt), 1)
    ids = torch.cat((padded, torch.randint(3, 61, (1, 9))))
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    batch = model.generate(ids, attention_mask=(ids != 0).long(), **settings)
    assert torch.equal(batch[0, 9:], model.generate(prompt, **settings)[0, 5:])


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    model = make()
    fuse(model)
    ids = torch.randint(3, 61, (1, 16))
    positions = torch.cat((torch.arange(7), torch.arange(9)))[None]
    model.train()
    want = run(model, ids, position_ids=positions, use_cache=False)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    got = run(model, ids, position_ids=positions, use_cache=False)
    assert torch.equal(got[0], want[0])
    assert all(torch.equal(a, b) for a, b in zip(got[1], want[1], strict=True))


def test_copies_and_pickles_stay_fused_and_equal(family):
    model = make(family)
    fuse(model)
    ids = torch.randint(3, 61, (1, 7))
    want = model(ids).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
        assert torch.equal(twin(ids).logits, want)


def test_a_fused_layer_is_still_the_layer_it_stands_for(family):
    model = make(family)
    kinds, keys = [type(m) for m in model.modules()], list(model.state_dict())
    fuse(model)
    assert all(isinstance(m, kind) for m, kind in zip(model.modules(), kinds, strict=True))
    assert list(model.state_dict()) == keys


def test_fusing_twice_is_fusing_once(family):
    model = make(family)
    fuse(model)
    once = [type(m) for m in model.modules()]
    fuse(model)
    assert [type(m) for m in model.modules()] == once


def test_a_weight_in_float32_beside_bfloat16_gives_float32_as_the_own_layer_does():
    plain = make(dtype=torch.bfloat16).model.norm.float()
    x = torch.randn(2, 32).bfloat16()
    want = plain(x)
    plain.__class__, _, _ = layers.fused_class(plain)
    assert plain(x).dtype == want.dtype == torch.float32
    torch.testing.assert_close(plain(x), want, rtol=2**-8, atol=0)


def test_autocast_runs_in_the_dtype_of_the_own_layers():
    plain, fused = make(), make()
    fuse(fused)
    ids = torch.randint(3, 61, (2, 9))
    with torch.autocast("cpu", torch.bfloat16):
        want, got = plain(ids).logits, fused(ids).logits
    exact = plain.double()(ids).logits
    assert got.dtype == want.dtype
    assert_twice_as_good(got, want, exact)


@pytest.mark.parametrize("reason", ["eager", "bidirectional"])
def test_attention_that_is_set_otherwise_keeps_its_own_code_and_says_why(reason):
    model = make(attn_implementation="eager") if reason == "eager" else make()
    attention = model.model.layers[0].self_attn
    attention.is_causal = reason != "bidirectional"
    fused, op, why = layers.fused_class(attention)
    assert (fused, op) == (None, "attention")
    assert reason in why


def test_attention_dropout_is_fused_in_training_alone():
    plain, model = make(), make(attention_dropout=0.3)
    fuse(model)
    assert {line.backend for line in explain(model.train()).layers if line.op == "attention"} == {"cpu"}
    batch = {"input_ids": torch.randint(3, 61, (2, 9)), "attention_mask": torch.ones(2, 9)}
    batch["attention_mask"][1, 6:] = 0
    outs = []
    for backend in ("cpu", "reference"):
        torch.manual_seed(7)
        with dispatch.force_backend(backend):
            outs.append(model(**batch).logits)
    torch.testing.assert_close(*outs)
    torch.manual_seed(8)
    assert not torch.allclose(model(**batch).logits, outs[0])
    torch.testing.assert_close(model.eval()(**batch).logits, plain(**batch).logits)


def test_attention_set_to_eager_after_it_was_fused_gives_its_weights():
    model = make()
    fuse(model)
    model.set_attn_implementation("eager")
    out = model(torch.randint(3, 61, (1, 5)), output_attentions=True)
    assert out.attentions[0].shape == (1, 4, 5, 5)


def test_a_mask_with_holes_is_obeyed():
    plain, fused = make(), make()
    fuse(fused)
    ids = torch.randint(3, 61, (1, 12))
    mask = torch.ones(12, 12, dtype=torch.bool).tril()
    mask[6:, 2] = mask[9:, 4:6] = False
    with torch.no_grad():
        want, got = (model(ids, attention_mask=mask[None, None]).logits for model in (plain, fused))
    torch.testing.assert_close(got, want)


def test_a_mask_for_all_rows_or_all_queries_is_spread_as_torch_spreads_it():
    plain, fused = make(), make()
    fuse(fused)
    ids, causal = torch.randint(3, 61, (2, 12)), torch.ones(12, 12, dtype=torch.bool).tril()
    padding = torch.ones(2, 1, 1, 12, dtype=torch.bool)
    padding[0, ..., 9:] = False
    for mask in (causal[None, None], padding, padding[:1], torch.ones(2, 1, 12, 1, dtype=torch.bool)):
        with torch.no_grad():
            want, got = (model(ids, attention_mask=mask).logits for model in (plain, fused))
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("without_gradient", [torch.no_grad, torch.inference_mode])
def test_a_mask_changed_in_place_is_read_again(without_gradient):
    model = make()
    fuse(model)
    ids = torch.randint(3, 61, (1, 12))
    with without_gradient():
        mask = torch.ones(12, 12, dtype=torch.bool).tril()[None, None]
        before = model(ids, attention_mask=mask).logits
        mask[..., :3] = False
        after = model(ids, attention_mask=mask).logits
        fresh = model(ids, attention_mask=mask.clone()).logits
    assert not torch.equal(before, after)
    assert torch.equal(after, fresh)


def test_unknown_layers_are_named_and_others_passed_over():
    class OtherRMSNorm(torch.nn.Module):
        pass

    assert layers.fused_class(OtherRMSNorm()) == (None, "rms_norm", "no fused layer stands for OtherRMSNorm")
    assert layers.fused_class(type("PlainMLP", (torch.nn.Module,), {})()) == (None, "", "")
    gated = type("GatedMLP", (torch.nn.Module,), {})()
    gated.gate_proj = torch.nn.Linear(2, 2)
    assert layers.fused_class(gated) == (None, "swiglu", "no fused layer stands for GatedMLP")
    assert layers.fused_class(torch.nn.Linear(2, 2)) == (None, "", "")
    relu = make("Llama", hidden_act="relu")
    fused, op, why = layers.fused_class(relu.model.layers[0].mlp)
    assert (fused, op) == (None, "swiglu")
    assert "activation is ReLU" in why


def test_what_runs_is_told(backend):
    model = make()
    for module, op in ((model.model.norm, "rms_norm"), (model.model.layers[0].mlp, "swiglu")):
        assert layers.running(module)[:2] == (op, backend)
    assert layers.running(model.model.layers[0].self_attn)[:2] == ("attention", backend)


@pytest.mark.skipif(not NATIVE, reason="the CPU kernels are not compiled")
def test_the_model_traces_whole():
    model = make()
    fuse(model)
    ids = torch.randint(3, 61, (2, 9))
    compiled = torch.compile(model.model, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), dispatch.force_backend("cpu"):
        got = compiled(ids, use_cache=False).last_hidden_state
        torch.testing.assert_close(got, model.model(ids, use_cache=False).last_hidden_state)
