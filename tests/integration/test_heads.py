"""The head joined with its loss: the loss and gradients of the plain model, in Trainer, PEFT and copies."""

import copy
import pickle

import numpy as np
import peft
import pytest
import torch
import transformers
from head_cases import VOCABULARY, Largest, assert_equal_to_rounding, batch, batch_of, needs_kernels
from transformers.loss.loss_utils import ForCausalLMLoss

import peft_engine as pe
from peft_engine.heads import FusedHeadLinear, attach_head, detach_head
from peft_engine.lazy_logits import LazyLogits

pytestmark = needs_kernels


# --- the same model --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_loss_and_every_gradient_are_those_of_the_plain_model(head_pair, dtype, tied):
    plain, fused = head_pair(dtype, tie_word_embeddings=tied)
    assert (fused.lm_head.weight is fused.model.embed_tokens.weight) == tied
    assert_equal_to_rounding(plain, fused, batch())


def test_a_frozen_head_gets_no_gradient_and_the_layers_below_the_same(head_pair):
    plain, fused = head_pair()
    for model in (plain, fused):
        model.lm_head.weight.requires_grad_(False)
    assert_equal_to_rounding(plain, fused, batch())
    assert fused.lm_head.weight.grad is None


@pytest.mark.parametrize("items", [5, torch.tensor(5), torch.tensor([5.0])])
def test_loss_is_divided_by_num_items_in_batch(head_pair, items):
    plain, fused = head_pair()
    inputs = batch() | {"num_items_in_batch": items}
    want, got = plain(**inputs).loss, fused(**inputs).loss
    assert got.shape == want.shape
    torch.testing.assert_close(got, want)


def test_shift_labels_replace_the_shift_of_the_labels(head_pair):
    plain, fused = head_pair()
    inputs = batch()
    inputs["shift_labels"] = torch.randint(0, VOCABULARY, inputs["labels"].shape)
    torch.testing.assert_close(fused(**inputs).loss, plain(**inputs).loss)


def test_labels_may_be_given_by_position(head_pair):
    plain, fused = head_pair()
    ids, labels = batch().values()
    output = fused(ids, None, None, None, None, labels)
    assert type(output.logits) is LazyLogits
    torch.testing.assert_close(output.loss, plain(ids, labels=labels).loss)


def test_logits_to_keep_gives_the_loss_of_those_positions(head_pair):
    plain, fused = head_pair()
    inputs = batch()
    inputs["labels"] = inputs["labels"][:, -5:]
    got, want = fused(**inputs, logits_to_keep=5), plain(**inputs, logits_to_keep=5)
    torch.testing.assert_close(got.loss, want.loss)
    assert got.logits.shape == want.logits.shape == (2, 5, VOCABULARY)


def test_evaluation_without_gradients_has_the_same_loss(head_pair):
    plain, fused = head_pair()
    with torch.no_grad():
        torch.testing.assert_close(fused(**batch_of(0)).loss, plain(**batch_of(0)).loss)
    with torch.inference_mode():
        output = fused(**batch_of(0))
        torch.testing.assert_close(output.loss, plain(**batch_of(0)).loss)
        assert torch.equal(output.logits + 0, plain(**batch_of(0)).logits)


def test_gradient_checkpointing_changes_nothing(head_pair):
    plain, fused = head_pair()
    for model in (plain, fused):
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_equal_to_rounding(plain, fused, batch() | {"use_cache": False})


def test_autocast_gives_the_loss_and_logits_of_autocast(head_pair):
    plain, fused = head_pair()
    inputs = batch()
    with torch.autocast("cpu", torch.bfloat16):
        want, got = plain(**inputs), fused(**inputs)
        torch.testing.assert_close(got.loss, want.loss)
    assert got.logits.dtype == want.logits.dtype == torch.bfloat16
    assert torch.equal(got.logits * 1, want.logits)
    got.loss.backward()
    want.loss.backward()
    torch.testing.assert_close(fused.lm_head.weight.grad, plain.lm_head.weight.grad, rtol=0.05, atol=1e-3)


def test_the_layers_of_a_compiled_model_give_the_same_loss_in_one_graph(head_pair):
    plain, fused = head_pair(num_hidden_layers=1)
    inputs = batch() | {"use_cache": False}
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    output = compiled(**inputs)
    torch.testing.assert_close(output.loss, plain(**inputs).loss)
    torch.testing.assert_close(output.logits, plain(**inputs).logits)
    output.loss.backward()


# --- memory ----------------------------------------------------------------------------------------------


def test_no_logits_are_formed_in_a_training_step(head_pair):
    _, fused = head_pair()
    fused.lm_head.weight.requires_grad_(False)
    inputs = batch(4, 50)
    inputs["labels"][:, :-2] = -100
    with Largest() as seen:
        fused(**inputs).loss.backward()
    rows = {shape[0] for _, shape in seen.logits}
    assert rows <= {8}, seen.logits  # rows with a label, not all 200


# --- Trainer, PEFT, generate -----------------------------------------------------------------------------


class Rows(torch.utils.data.Dataset):
    def __init__(self, n=8):
        torch.manual_seed(1)
        self.rows = [{k: v[0] for k, v in batch(1).items()} for _ in range(n)]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


def trainer(model, folder, **changes):
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 1,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "seed": 3,
    }
    return transformers.Trainer(
        model,
        transformers.TrainingArguments(**(settings | changes)),
        train_dataset=Rows(),
        eval_dataset=Rows(4),
    )


@pytest.mark.parametrize("changes", [{}, {"bf16": True}], ids=["float32", "bf16 autocast"])
def test_trainer_trains_and_evaluates_with_the_same_losses(head_pair, tmp_path, changes):
    logs = []
    for model in head_pair():
        run = trainer(model, tmp_path, **changes)
        run.train()
        metrics = run.evaluate()
        logs.append([e["loss"] for e in run.state.log_history if "loss" in e] + [metrics["eval_loss"]])
    assert logs[0] == pytest.approx(logs[1], rel=1e-4 if not changes else 1e-2)


@pytest.mark.parametrize("loss_only", [True, False])
def test_trainer_predictions_are_the_logits_and_loss_only_forms_none(head_pair, tmp_path, loss_only):
    plain, fused = head_pair()
    results = []
    for model in (plain, fused):
        run = trainer(model, tmp_path, prediction_loss_only=loss_only, eval_accumulation_steps=1)
        results.append(run.predict(Rows(4)))
    want, got = results
    assert got.metrics["test_loss"] == pytest.approx(want.metrics["test_loss"], rel=1e-6)
    if loss_only:
        assert got.predictions is None
    else:
        assert np.array_equal(got.predictions, want.predictions)


def test_a_peft_model_over_it_has_the_same_loss_and_adapter_gradients(head_pair):
    losses = []
    for model in head_pair():
        torch.manual_seed(5)
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
        output = wrapped(**batch_of(2))
        output.loss.backward()
        grads = [p.grad for p in wrapped.parameters() if p.requires_grad]
        losses.append((output.loss, *grads))
    assert type(output.logits) is LazyLogits
    for want, got in zip(*losses, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-7)


def test_a_peft_model_is_attached_through_its_wrapper(tiny_llama):
    wrapped = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=4, target_modules="all-linear"))
    assert attach_head(wrapped).fused
    assert type(wrapped(**batch()).logits) is LazyLogits
    detach_head(wrapped)
    assert type(wrapped(**batch()).logits) is torch.Tensor


def test_a_model_in_data_parallel_is_attached_through_its_wrapper(tiny_llama):
    model = tiny_llama()
    wrapped = torch.nn.DataParallel(model)
    assert attach_head(wrapped).fused and type(model.lm_head) is FusedHeadLinear
    detach_head(wrapped)
    assert type(model.lm_head) is torch.nn.Linear


def test_a_head_whose_forward_was_replaced_stays_as_it_is(tiny_llama):
    model = tiny_llama()
    own = model.lm_head.forward
    model.lm_head.forward = lambda x: 2 * own(x)
    report = attach_head(model)
    assert not report.fused and "forward was replaced" in report.reason
    assert type(model.lm_head) is torch.nn.Linear


def test_generation_is_unaffected(head_pair):
    plain, fused = head_pair()
    ids = batch()["input_ids"]
    for settings in ({"do_sample": False}, {"num_beams": 2}, {"do_sample": False, "use_cache": False}):
        arguments = {"max_new_tokens": 5, "pad_token_id": 0, **settings}
        assert torch.equal(fused.generate(ids, **arguments), plain.generate(ids, **arguments))


# --- the model as an object ------------------------------------------------------------------------------


def test_an_attached_model_can_be_copied_and_pickled_and_stays_attached(head_pair):
    plain, fused = head_pair()
    for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        output = twin(**batch_of(4))
        assert type(output.logits) is LazyLogits
        torch.testing.assert_close(output.loss, plain(**batch_of(4)).loss)
        detach_head(twin)
        assert type(twin(**batch()).logits) is torch.Tensor


def test_what_is_saved_is_the_plain_model(head_pair, tmp_path):
    plain, fused = head_pair()
    fused.save_pretrained(tmp_path / "fused")
    plain.save_pretrained(tmp_path / "plain")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "fused" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "fused")
    assert type(loaded.lm_head) is torch.nn.Linear


def test_detach_leaves_the_model_as_it_was(tiny_llama):
    model = tiny_llama()
    before = {k: set(vars(m)) for k, m in model.named_modules()}
    attach_head(model)
    attach_head(model)  # twice is once
    assert len(model._forward_pre_hooks) == 1
    assert isinstance(model.lm_head, torch.nn.Linear) and type(model.lm_head) is FusedHeadLinear
    detach_head(model)
    assert {k: set(vars(m)) for k, m in model.named_modules()} == before
    assert type(model.lm_head) is torch.nn.Linear and not model._forward_pre_hooks
    assert model.loss_function is ForCausalLMLoss
    detach_head(model)


def test_a_model_moved_to_the_meta_device_gives_logits_with_labels(tiny_llama):
    model = tiny_llama()
    pe.optimize(model)
    ids = torch.zeros(2, 5, dtype=torch.int64, device="meta")
    out = model.to("meta")(ids, labels=ids)
    assert out.logits.float().argmax(-1).shape == (2, 5) and out.loss.is_meta


@pytest.mark.peers
def test_a_mixed_model_of_peft_around_an_optimised_one(tiny_llama):
    peft = pytest.importorskip("peft", reason="peft is not installed (the `peers` extra)")
    model, ids = tiny_llama(), torch.arange(10).view(2, 5)
    want = model(ids, labels=ids).loss
    pe.optimize(model)
    mixed = peft.get_peft_model(model, peft.LoHaConfig(r=2, target_modules=["q_proj"]), mixed=True)
    pe.optimize(mixed)
    torch.testing.assert_close(mixed(ids, labels=ids).loss, want)


def test_a_report_taken_for_the_model_says_so(tiny_llama):
    with pytest.raises(TypeError, match="optimize changes the model in place and returns a report"):
        pe.optimize(tiny_llama())(torch.arange(5)[None])
