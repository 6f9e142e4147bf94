"""The head joined with its loss in models that call nn.CrossEntropyLoss themselves: T5, BART and others."""

import copy

import peft
import pytest
import torch
import transformers
from head_cases import VOCABULARY, Largest, assert_equal_to_rounding, needs_kernels

import peft_engine as pe
from peft_engine.heads import attach_head, describe_head, detach_head
from peft_engine.lazy_logits import LazyLogits

pytestmark = needs_kernels

SHARED = {"vocab_size": VOCABULARY, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 2}
T5 = SHARED | {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
BART = SHARED | {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "init_std": 0.2,  # or attention is all but uniform, and gradients of queries and keys all but zero
    **dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), 0.0),
    **dict.fromkeys(("encoder_layerdrop", "decoder_layerdrop"), 0.0),
    "bos_token_id": 3,
    "forced_eos_token_id": None,
}
MODELS = {
    "T5": (transformers.T5Config, transformers.T5ForConditionalGeneration, T5),
    "T5, untied": (
        transformers.T5Config,
        transformers.T5ForConditionalGeneration,
        T5 | {"tie_word_embeddings": False},
    ),
    "BART": (transformers.BartConfig, transformers.BartForConditionalGeneration, BART),
    "Pegasus": (transformers.PegasusConfig, transformers.PegasusForConditionalGeneration, BART),
    "Marian": (transformers.MarianConfig, transformers.MarianMTModel, BART),
    "M2M100": (transformers.M2M100Config, transformers.M2M100ForConditionalGeneration, BART),
}


APART = "lm_head", "shared", "final_logits_bias", "decoder.final_layer_norm"


def plain_model(name, dtype=torch.float32):
    config, model, fields = MODELS[name]
    torch.manual_seed(0)
    made = model(config(**fields)).to(dtype)
    if hasattr(made, "final_logits_bias"):
        torch.nn.init.normal_(made.final_logits_bias)
    return made


def pair_of(plain):
    fused = copy.deepcopy(plain)
    report = attach_head(fused)
    assert report.fused and report.name == "lm_head" and not report.reason, report
    return plain, fused


def with_lora(model):
    """Adapters that do something in all that is not the head, which is frozen; PEFT's have a float64."""
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=r".*\.(q|v|q_proj|v_proj)"))
    for path, parameter in model.named_parameters():
        if "lora_B" in path:
            torch.nn.init.normal_(parameter.data, std=0.2)
    return model


def batch(rows=2, tokens=9):
    torch.manual_seed(1)
    labels = torch.randint(4, VOCABULARY, (rows, tokens))
    labels[0, 5:] = -100
    return {"input_ids": torch.randint(4, VOCABULARY, (rows, 7)), "labels": labels}


# --- the same model -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_every_gradient_are_those_of_the_plain_model(name, dtype):
    plain, fused = pair_of(plain_model(name, dtype))
    inputs = batch()
    assert type(fused(**inputs).logits) is LazyLogits
    assert_equal_to_rounding(plain, fused, inputs, APART)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_adapters_below_a_frozen_head_get_the_same_gradients(name, dtype):
    plain, fused = pair_of(with_lora(plain_model(name, dtype)))
    assert_equal_to_rounding(plain, fused, batch(), APART)
    assert fused.lm_head.weight.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head", [True, False], ids=["trained head", "frozen head"])
@pytest.mark.parametrize("name", ["BART", "Pegasus", "Marian"])
def test_a_trained_bias_gets_its_gradient(name, head, dtype):
    plain = plain_model(name, dtype)
    plain.lm_head.weight.requires_grad_(head)
    bias = plain._buffers.pop("final_logits_bias")
    plain.register_parameter("final_logits_bias", torch.nn.Parameter(bias.detach()))
    plain, fused = pair_of(plain)
    assert_equal_to_rounding(plain, fused, batch(), APART)
    assert fused.final_logits_bias.grad.any()


@pytest.mark.parametrize("name", MODELS)
def test_without_a_labelled_row_the_loss_is_what_torch_says(name):
    inputs = batch()
    inputs["labels"].fill_(-100)
    inputs["decoder_input_ids"] = torch.ones_like(inputs["labels"])
    for model in pair_of(plain_model(name)):
        assert model(**inputs).loss.isnan()


@pytest.mark.parametrize("name", MODELS)
def test_evaluation_and_autocast_give_the_same_loss_and_logits(name):
    plain, fused = pair_of(plain_model(name).eval())
    inputs = batch()
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            want, got = plain(**inputs), fused(**inputs)
            assert type(got.logits) is LazyLogits
            torch.testing.assert_close(got.loss, want.loss)
            torch.testing.assert_close(got.logits + 0, want.logits)
            ids = {"input_ids": inputs["input_ids"], "decoder_input_ids": inputs["input_ids"]}
            assert type(fused(**ids).logits) is torch.Tensor
            assert torch.equal(fused(**ids).logits, plain(**ids).logits)
    with torch.autocast("cpu", torch.bfloat16):
        want, got = plain(**inputs), fused(**inputs)
    assert got.loss.dtype == want.loss.dtype and got.logits.dtype == want.logits.dtype
    torch.testing.assert_close(got.loss, want.loss, rtol=5e-3, atol=0)
    torch.testing.assert_close(got.logits + 0, want.logits, rtol=2e-2, atol=2e-2)
    got.loss.backward()
    want.loss.backward()
    for (path, p), q in zip(plain.named_parameters(), fused.parameters(), strict=True):
        if p.grad is not None:
            torch.testing.assert_close(q.grad, p.grad, rtol=0.05, atol=5e-3, msg=path)


# --- memory and readers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_no_logits_are_formed_in_a_training_step(name):
    _, fused = pair_of(with_lora(plain_model(name)))
    inputs = batch(4, 50)
    inputs["labels"][:, :-2] = -100
    inputs["decoder_input_ids"] = torch.ones_like(inputs["labels"])
    with Largest() as seen:
        fused(**inputs).loss.backward()
    many = [(op, shape) for op, shape in seen.logits if shape.numel() > 8 * VOCABULARY]
    assert not many, many  # the rows with a label, not all 200


@pytest.mark.parametrize("name", ["T5", "BART", "Pegasus"])
def test_logits_read_after_the_loss_have_the_true_values_and_gradients(name):
    plain, fused = pair_of(plain_model(name))
    inputs = batch()
    for model in (plain, fused):
        output = model(**inputs)
        (output.loss + torch.logsumexp(output.logits, -1).mean()).backward()
    torch.testing.assert_close(output.logits + 0, plain(**inputs).logits)
    for (path, p), q in zip(plain.named_parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-6, msg=path)


@pytest.mark.parametrize("name", ["T5", "BART", "Pegasus"])
def test_a_hook_that_masks_the_logits_in_place_changes_the_loss(name):
    def mask(module, args, logits):
        logits[..., :9] = -5.0

    losses = []
    for model in pair_of(plain_model(name)):
        model.lm_head.register_forward_hook(mask)
        losses.append(model(**batch()).loss)
    torch.testing.assert_close(losses[1], losses[0])
    losses[1].backward()


def test_what_is_written_through_a_view_is_in_the_logits_and_in_the_next_loss():
    losses, labels = [], batch()["labels"].view(-1)
    for model in pair_of(plain_model("BART")):
        logits = model(**batch()).logits
        rows = logits.view(-1, VOCABULARY)
        rows[3:] = 0.25
        assert (logits.flatten(0, 1)[3:] == 0.25).all()
        losses.append(torch.nn.functional.cross_entropy(rows, labels))
        losses[-1].backward()
    torch.testing.assert_close(losses[1], losses[0])


LOSSES = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "other index": {"ignore_index": 5},
    "each row": {"reduction": "none"},
    "smoothed": {"label_smoothing": 0.1},
    "weighted": {"weight": torch.linspace(0.5, 2.0, VOCABULARY)},
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_cross_entropy_of_ones_own_over_the_logits_is_torchs(name):
    plain, fused = pair_of(plain_model("BART"))
    inputs = batch()
    labels = inputs["labels"].clamp(min=0) if name == "other index" else inputs["labels"]
    for model in (plain, fused):
        logits = model(**inputs).logits
        loss = torch.nn.functional.cross_entropy(logits.view(-1, VOCABULARY), labels.view(-1), **LOSSES[name])
        loss.sum().backward()
        if model is plain:
            want = loss
    torch.testing.assert_close(loss, want)
    for (path, p), q in zip(plain.named_parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-6, msg=path)


def test_a_cross_entropy_of_logits_that_were_read_runs_on_them():
    _, fused = pair_of(plain_model("T5"))
    logits, labels = fused(**batch()).logits, batch()["labels"].view(-1)
    with Largest() as seen:
        logits.argmax(-1)
        torch.nn.functional.cross_entropy(logits.view(-1, VOCABULARY), labels).backward()
    assert len([op for op, _ in seen.logits if "mm" in op]) == 1


def test_probabilities_as_targets_and_classes_before_positions_are_torchs():
    plain, fused = pair_of(plain_model("T5"))
    inputs, entropy = batch(), torch.nn.functional.cross_entropy
    target = torch.rand(2, 9, VOCABULARY).softmax(-1)
    found = []
    for model in (plain, fused):
        logits = model(**inputs).logits
        rows = logits.view(-1, VOCABULARY), target.view(-1, VOCABULARY)
        found.append([entropy(*rows), entropy(logits.mT, inputs["labels"])])
    torch.testing.assert_close(found[1], found[0])


def test_a_detached_loss_trains_nothing_and_a_detached_sum_neither():
    _, fused = pair_of(plain_model("BART"))
    inputs = batch()
    logits = fused(**inputs).logits.detach()
    rows = logits.view(-1, VOCABULARY)
    assert type(rows) is LazyLogits
    assert not torch.nn.functional.cross_entropy(rows, inputs["labels"].view(-1)).requires_grad
    assert not (logits + fused.final_logits_bias).requires_grad


def test_a_label_outside_the_vocabulary_is_an_error_of_both():
    inputs = batch() | {"decoder_input_ids": torch.ones(2, 9, dtype=torch.long)}
    inputs["labels"][0, 0] = VOCABULARY
    for model in pair_of(plain_model("T5")):
        with pytest.raises(IndexError):
            model(**inputs)


# --- in and out ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_detach_leaves_the_model_as_it_was_and_the_loss_function_is_not_touched(name):
    model = plain_model(name)
    before = {k: set(vars(m)) for k, m in model.named_modules()}
    own = model.loss_function
    attach_head(model)
    attach_head(model)  # twice is once
    assert model.loss_function is own and "_loss_function" not in vars(model)
    detach_head(model)
    assert {k: set(vars(m)) for k, m in model.named_modules()} == before
    assert type(model.lm_head) is torch.nn.Linear and not model._forward_pre_hooks
    assert type(model(**batch()).logits) is torch.Tensor


@pytest.mark.parametrize("name", ["T5", "BART"])
def test_optimize_joins_head_and_loss_and_unoptimize_parts_them(name):
    model = pe.attach(plain_model(name), pe.LoraConfig(r=4))
    want = model(**batch()).loss
    (line,) = [found for found in pe.optimize(model).layers if found.op == "linear_cross_entropy"]
    assert line.fused and line.name == "lm_head"
    torch.testing.assert_close(model(**batch()).loss, want)
    pe.unoptimize(model)
    assert type(model(**batch()).logits) is torch.Tensor


def test_an_adapter_on_the_head_keeps_the_models_own_loss():
    model = pe.attach(plain_model("T5, untied"), pe.LoraConfig(r=4, target_modules=["q", "lm_head"]))
    want = model(**batch()).loss
    (line,) = [found for found in pe.optimize(model).layers if found.op == "linear_cross_entropy"]
    assert not line.fused and "not a plain linear layer" in line.reason
    torch.testing.assert_close(model(**batch()).loss, want)


def test_models_whose_loss_is_another_say_so():
    config = transformers.ProphetNetConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_encoder_layers=1,
        num_decoder_layers=1,
        num_encoder_attention_heads=2,
        num_decoder_attention_heads=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
    )
    report = describe_head(transformers.ProphetNetForConditionalGeneration(config))
    assert not report.fused and "neither self.loss_function nor CrossEntropyLoss" in report.reason
    config = transformers.ImageGPTConfig(vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=2)
    report = describe_head(transformers.ImageGPTForCausalImageModeling(config))
    assert not report.fused and "the head itself returns: shift_logits" in report.reason
