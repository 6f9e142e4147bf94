"""Which models' heads are joined with their loss, and what is said of the others."""

import copy
import dataclasses
import re

import peft
import pytest
import torch
import transformers
from head_cases import VOCABULARY, Largest, batch_of, needs_kernels

from peft_engine import dispatch
from peft_engine.heads import attach_head, causal_lm_loss, describe_head
from peft_engine.lazy_logits import LazyLogits

pytestmark = needs_kernels

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


def small(name, **changes):
    config = getattr(transformers, f"{name}Config")(**(SMALL | changes))
    torch.manual_seed(0)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


TAKEN = {
    "Qwen2": {},
    "Qwen3": {"head_dim": 16},
    "Mistral": {},
    "Phi": {},  # a bias on the head
    "Gemma": {"head_dim": 16},
    "Gemma2": {"head_dim": 16, "final_logit_softcapping": None},
    "Gemma2, capped": {"head_dim": 16, "final_logit_softcapping": 0.7},
    "Mixtral": {"num_local_experts": 2, "output_router_logits": True},  # its expert loss is added to ours
    "GPTNeoX": {},
    "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32},
}


@pytest.mark.parametrize("name", TAKEN)
def test_models_with_a_plain_linear_head_are_taken(name):
    plain = small(name.partition(",")[0], **TAKEN[name])
    fused = copy.deepcopy(plain)
    report = attach_head(fused)
    assert report.fused, report
    want, got = plain(**batch_of(6)), fused(**batch_of(6))
    assert type(got.logits) is LazyLogits
    torch.testing.assert_close(got.loss, want.loss)
    torch.testing.assert_close(got.logits * 1.0, want.logits)
    want.loss.backward()
    got.loss.backward()
    for (path, p), q in zip(plain.named_parameters(), fused.named_parameters(), strict=True):
        assert (p.grad is None) == (q[1].grad is None)
        if p.grad is not None:
            torch.testing.assert_close(q[1].grad, p.grad, rtol=1e-3, atol=1e-6, msg=path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_capped_logits_are_formed_for_no_loss_and_are_the_models_own_when_read(dtype):
    plain = small("Gemma2", head_dim=16, final_logit_softcapping=0.7).to(dtype)
    fused = copy.deepcopy(plain)
    assert attach_head(fused).fused
    batch = batch_of(3)
    with Largest() as seen:
        loss = fused(**batch).loss
    assert all(shape[-2:] != (batch["labels"].shape[1], VOCABULARY) for _, shape in seen.logits)
    assert loss.dtype == torch.float32
    for what in (lambda out: out.logits.float().sin().sum(), lambda out: out.logits[:, 3:].square().sum()):
        grads = []
        for model in (plain, fused):
            model.zero_grad()
            what(model(**batch)).backward()
            grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        torch.testing.assert_close(*grads)
    with torch.no_grad():
        torch.testing.assert_close(fused(**batch).logits.sum(), plain(**batch).logits.sum())


def test_steps_that_are_no_softcap_form_the_logits():
    hidden, weight = torch.randn(3, 8, requires_grad=True), torch.randn(VOCABULARY, 8)
    plain = hidden @ weight.T
    for steps in (
        lambda z: z / 2.0,
        lambda z: torch.tanh(z),
        lambda z: z * 2.0,
        lambda z: torch.tanh(z / 2.0),
        lambda z: torch.tanh(z / 2.0) * 3.0,
        lambda z: z / torch.tensor(2.0),
        lambda z: torch.tanh(z / 2.0) * torch.full((VOCABULARY,), 2.0),
        lambda z: z / -2.0,
        lambda z: torch.tanh(z / 2.0) * 2.0 + 1.0,
    ):
        got, want = steps(LazyLogits.of(hidden, weight, None)), steps(plain)
        torch.testing.assert_close(got * 1.0, want)
        gradients = [torch.autograd.grad(y.sin().sum(), hidden, retain_graph=True)[0] for y in (got, want)]
        torch.testing.assert_close(*gradients)


def test_the_gradient_of_capped_logits_that_autograd_alone_sees_is_theirs():
    hidden, weight = torch.randn(3, 8, requires_grad=True), torch.randn(VOCABULARY, 8, requires_grad=True)

    class Twice(torch.autograd.Function):  # whose forward is handed the logits below autograd
        @staticmethod
        def forward(ctx, logits):
            return logits * 2.0

        @staticmethod
        def backward(ctx, grad):
            return grad * 2.0

    found = []
    for logits in (LazyLogits.of(hidden, weight, None), hidden @ weight.T):
        out = Twice.apply(torch.tanh(logits / 0.7) * 0.7)
        found.append((out.detach(), *torch.autograd.grad(out.sin().sum(), (hidden, weight))))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)


REFUSED = {
    "Cohere": ({}, "not of what the head itself returns: logits = logits \\* self.logit_scale"),
    "Granite": ({"logits_scaling": 2.0}, "not of what the head itself returns: logits = logits / "),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_change_their_logits_keep_their_own_loss_and_say_why(name):
    changes, reason = REFUSED[name]
    model = small(name, **changes)
    before = dict(vars(model))
    report = attach_head(model)
    assert not report.fused and report.backend == "transformers"
    assert re.search(reason, report.reason)
    assert vars(model) == before and type(model.get_output_embeddings()) is torch.nn.Linear


def own_loss(logits, labels, vocab_size, **kwargs):
    return logits.sum()


def test_a_loss_of_the_users_own_an_adapted_head_and_other_models_are_refused_by_name(tiny_llama):
    model = tiny_llama()
    model.loss_function = own_loss
    assert "own_loss" in attach_head(model).reason
    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=2, target_modules=["lm_head"]))
    assert "not a plain linear layer" in attach_head(model).reason
    assert attach_head(torch.nn.Linear(2, 2)).reason
    config = tiny_llama().config
    assert "output head" in attach_head(transformers.LlamaForSequenceClassification(config)).reason


def test_the_report_changes_nothing_and_names_the_backend_that_is_missing(tiny_llama):
    model = tiny_llama()
    assert describe_head(model).fused and type(model.lm_head) is torch.nn.Linear
    with dispatch.force_backend("reference"):
        report = attach_head(model)
    assert not report.fused and report.reason
    assert dataclasses.asdict(report)["op"] == "linear_cross_entropy"
    assert causal_lm_loss.__module__ == "peft_engine.heads"
