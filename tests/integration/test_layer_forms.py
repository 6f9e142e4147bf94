"""Fused layers in families that have them by their code alone, against plain torch."""

import copy

import pytest
import torch
import transformers
from accuracy import assert_twice_as_good
from transformers import activations
from transformers.models.gemma4.modeling_gemma4 import Gemma4RMSNorm
from transformers.models.mt5.modeling_mt5 import MT5LayerNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.t5.modeling_t5 import T5DenseGatedActDense, T5LayerNorm

import peft_engine as pe
from peft_engine import layers, native

native_only = pytest.mark.skipif(native.load_error() is not None, reason=str(native.load_error()))

LLAMA = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 61, "max_position_embeddings": 64, "head_dim": 8,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
GROUPS = {"first_k_dense_replace": 1, "n_routed_experts": 4, "n_group": 1, "topk_group": 1}
T5 = {
    "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 61,
    "dropout_rate": 0.0, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip
NORMS, MLPS = {"rms_norm"}, {"rms_norm", "swiglu"}
ALL = {"rms_norm", "swiglu", "attention"}
# The config and the ops of its fused layers, besides those that go by transformers' attention interface.
FAMILIES = {
    "arcee": (LLAMA, {"rms_norm", "attention"}),  # its MLP has no gate
    "cwm": (LLAMA | {"sliding_window": 6}, ALL),
    "dots1": (LLAMA | EXPERTS | GROUPS | {"n_shared_experts": 1}, ALL),
    "exaone4": (LLAMA, MLPS),
    "gemma2": (LLAMA | {"sliding_window": 6, "final_logit_softcapping": 3.0}, MLPS),
    "gemma3_text": (LLAMA | {"sliding_window": 6}, ALL),
    "gemma4_text": (
        LLAMA | {
            "final_logit_softcapping": 3.0, "vocab_size_per_layer_input": 61, "hidden_size_per_layer_input": 8
        },
        MLPS,
    ),
    "glm4": (LLAMA, MLPS),  # pairs of neighbours are turned
    "granitemoe": (LLAMA | EXPERTS, {"rms_norm", "attention"}),
    "helium": (LLAMA, {"swiglu"}),
    "ministral": (LLAMA | {"sliding_window": 6}, ALL),
    "mixtral": (LLAMA | EXPERTS, {"rms_norm", "attention"}),
    "olmo2": (LLAMA, MLPS),
    "olmoe": (LLAMA | EXPERTS, NORMS),
    "qwen3_moe": (LLAMA | EXPERTS | {"mlp_only_layers": [0]}, ALL),
    "stablelm": (LLAMA, {"swiglu"}),
    "t5": (T5, MLPS),
    "mt5": (T5, MLPS),
    "umt5": (T5 | {"feed_forward_proj": "gated-silu"}, MLPS),
    "longt5": (T5 | {"local_radius": 3}, MLPS),
    "gpt2": ({"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 61, "n_positions": 64}, {"gelu"}),
    "phi": (LLAMA, {"gelu"}),
}  # fmt: skip


def make(family: str):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **FAMILIES[family][0])
    seq2seq = config.is_encoder_decoder
    auto = transformers.AutoModelForSeq2SeqLM if seq2seq else transformers.AutoModelForCausalLM
    model = auto.from_config(config, experts_implementation="eager")  # torch's grouped product has no float64
    for parameter in model.parameters():  # norms and biases are all ones and zeros otherwise
        torch.nn.init.normal_(parameter, 0.0 if parameter.dim() >= 2 else 0.7, 0.1)
    return model.eval()


def run(model, ids):
    """The loss, and the gradients of all parameters as one vector."""
    loss = model(input_ids=ids, labels=ids).loss
    model.zero_grad()
    loss.backward()
    grads = [p.grad.double().flatten() for p in model.parameters() if p.grad is not None]
    return loss.detach(), torch.cat(grads).to(loss.dtype)


@native_only
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_with_fused_layers_is_within_twice_the_own_error(family):
    plain, ids = make(family), torch.randint(3, 61, (2, 11))
    fused, exact = copy.deepcopy(plain), copy.deepcopy(plain).double()
    report = pe.optimize(fused)
    found = {line.op for line in report.layers if line.fused} & {*MLPS, "gelu"}
    found |= {"attention"} & {
        layers._fused(type(m))[1] for m in fused.modules() if type(m).__module__ == layers.__name__
    }
    assert found == FAMILIES[family][1]
    assert not [line for line in report.layers if line.reason == "peft_engine.optimize(model) fuses it"]
    results = [run(model, ids) for model in (fused, plain, exact)]
    for what, values in zip(("loss", "gradients"), zip(*results, strict=True), strict=True):
        assert_twice_as_good(*values, what=f"{family} {what}")
    pe.unoptimize(fused)
    assert [type(m) for m in fused.modules()] == [type(m) for m in plain.modules()]


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@native_only
@pytest.mark.parametrize("kind", [T5LayerNorm, MT5LayerNorm, Olmo2RMSNorm, Gemma4RMSNorm])
@pytest.mark.parametrize("weight", DTYPES)
@pytest.mark.parametrize("given", DTYPES)
def test_a_norm_gives_the_dtype_of_the_own_one_whatever_those_of_input_and_weight(kind, weight, given):
    plain = kind(40).to(weight)
    torch.nn.init.normal_(plain.weight, 1.0, 0.3)
    fused = copy.deepcopy(plain)
    fused.__class__ = layers.fused_class(fused)[0]
    x = torch.randn(3, 40).to(given)
    want, got = plain(x), fused(x)
    assert got.dtype == want.dtype and type(fused) is not kind
    wide, eps = x.double(), getattr(plain, "variance_epsilon", None) or plain.eps
    exact = wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * plain.weight.double()
    assert_twice_as_good(got, want, exact)


@native_only
@pytest.mark.parametrize("act", ["gelu_new", "gelu", "silu", "gelu_pytorch_tanh", "gelu_fast"])
def test_the_gated_mlp_of_t5_with_its_last_layer_in_float32_and_dropout(act):
    plain = T5DenseGatedActDense(transformers.T5Config(**T5 | {"dropout_rate": 0.3})).bfloat16()
    plain.act = activations.ACT2FN[act]
    plain.wo.float()
    fused = copy.deepcopy(plain)
    assert layers.fused_class(fused)[1:] == ("swiglu", "")
    fused.__class__ = layers.fused_class(fused)[0]
    x = torch.randn(5, 32).bfloat16()
    want, got = plain.eval()(x), fused.eval()(x)
    assert got.dtype == want.dtype == torch.float32
    assert_twice_as_good(got, want, copy.deepcopy(plain).double()(x.double()))
    torch.manual_seed(3)
    want = plain.train()(x)
    torch.manual_seed(3)
    torch.testing.assert_close(fused.train()(x), want, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("act", ["relu", "quick_gelu", "tanh"])
def test_an_mlp_with_another_activation_keeps_its_own_code_and_says_so(act):
    mlp = T5DenseGatedActDense(transformers.T5Config(**T5))
    fused = layers.fused_class(mlp)[0]
    assert fused is not None
    want = copy.deepcopy(mlp)
    mlp.act = want.act = activations.ACT2FN[act]
    assert layers.fused_class(mlp)[:2] == (None, "swiglu")
    assert type(mlp.act).__name__ in layers.fused_class(mlp)[2]
    mlp.__class__ = fused  # set after it was fused
    x = torch.randn(2, 32)
    assert torch.equal(mlp(x), want(x))


def test_an_activation_that_inherits_from_a_known_one_is_not_taken_for_it():
    class Doubled(activations.NewGELUActivation):
        def forward(self, input):
            return 2 * super().forward(input)

    mlp = T5DenseGatedActDense(transformers.T5Config(**T5))
    mlp.act = Doubled()
    assert layers.fused_class(mlp)[0] is None and layers.fused_class(mlp.act)[0] is None


@pytest.mark.parametrize("name", ["gelu_new", "gelu_fast"])
def test_gelu_by_tanh_is_within_twice_the_own_error(name):
    plain, fused = activations.ACT2FN[name], activations.ACT2FN[name]
    fused.__class__, op, _ = layers.fused_class(fused)
    assert op == "gelu" and layers.running(fused) == ("gelu", "torch", "")
    for dtype in DTYPES:
        results = []
        for module, kind in ((fused, dtype), (plain, dtype), (plain, torch.float64)):
            x = torch.linspace(-8, 8, 4001).to(dtype).to(kind).requires_grad_()
            y = module(x)
            results.append((y.detach(), torch.autograd.grad(y.sum(), x)[0]))
        for values in zip(*results, strict=True):
            assert_twice_as_good(*values, what=f"{name} {dtype}")


def test_a_layer_that_only_has_the_name_is_not_taken_for_the_same():
    class LlamaRMSNorm(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.variance_epsilon = torch.nn.Parameter(torch.ones(8)), 1e-6

        def forward(self, hidden_states):
            return self.weight * hidden_states

    fused, op, why = layers.fused_class(LlamaRMSNorm())
    assert (fused, op) == (None, "rms_norm") and "no fused layer stands for" in why


HOOKS = {
    "forward": lambda act: act.register_forward_hook(lambda module, args, out: out * 0),
    "before": lambda act: act.register_forward_pre_hook(lambda module, args: (args[0] * 0,)),
    "backward": lambda act: act.register_full_backward_hook(lambda module, dx, dy: (dx[0] * 0,)),
    "replaced": lambda act: setattr(act, "forward", torch.relu),
}


@pytest.mark.parametrize("after", [False, True], ids=["before optimize", "after"])
@pytest.mark.parametrize("how", HOOKS)
def test_hooks_of_an_activation_run(how, after):
    sizes = {"hidden_size": 36, "intermediate_size": 100, "num_hidden_layers": 2, "num_attention_heads": 3}
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=1, head_dim=12, vocab_size=103)
    model = transformers.LlamaForCausalLM(config)
    plain, ids = copy.deepcopy(model), torch.arange(3, 35).view(4, 8)
    HOOKS[how](plain.model.layers[0].mlp.act_fn)
    if after:
        pe.optimize(model)
    HOOKS[how](model.model.layers[0].mlp.act_fn)
    report = pe.explain(model) if after else pe.optimize(model)
    (line,) = [layer for layer in report.layers if layer.name == "model.layers.0.mlp"]
    assert not line.fused and "its activation has hooks or another forward" in line.reason
    for of in (plain, model):
        of(ids, labels=ids).loss.backward()
    for want, got in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-4, atol=1e-6)
