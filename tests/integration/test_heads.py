"""The head joined with its loss: loss and gradients of the plain model, logits for whoever reads them."""

import copy
import dataclasses
import io
import pickle
import re

import numpy as np
import peft
import pytest
import torch
import transformers
from accelerate.utils import convert_outputs_to_fp32
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.loss.loss_utils import ForCausalLMLoss

from peft_engine import dispatch, native
from peft_engine.heads import FusedHeadLinear, attach_head, causal_lm_loss, describe_head, detach_head
from peft_engine.lazy_logits import LazyLogits

pytestmark = pytest.mark.skipif(native.load_error() is not None, reason=str(native.load_error()))

VOCABULARY = 101


@pytest.fixture
def pair(tiny_llama):
    """A factory: a plain model and an attached copy of it."""

    def make(dtype=torch.float32, **changes):
        plain = tiny_llama(dtype, **changes)
        fused = copy.deepcopy(plain)
        report = attach_head(fused)
        assert report.fused and report.backend == "cpu" and report.name == "lm_head", report
        return plain, fused

    return make


def batch(rows=2, tokens=12):
    ids = torch.randint(0, VOCABULARY, (rows, tokens))
    labels = ids.clone()
    labels[:, :3] = -100
    labels[0, 8:] = -100
    return {"input_ids": ids, "labels": labels}


def gradients(model, inputs):
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_equal_to_rounding(plain, fused, inputs):
    """Errors against the model in float64: at most twice those of the plain model, plus one ulp."""
    exact_loss, exact = gradients(copy.deepcopy(plain).double(), inputs)
    want_loss, want = gradients(plain, inputs)
    loss, got = gradients(fused, inputs)
    assert got.keys() == want.keys() == exact.keys()
    for name, g, r, truth in [
        ("loss", loss, want_loss, exact_loss),
        *((n, got[n], want[n], exact[n]) for n in want),
    ]:
        assert g.dtype == r.dtype, name
        ulp = torch.finfo(r.dtype).eps * truth.abs().max()
        for size in (lambda t: t.abs().max(), torch.linalg.vector_norm):
            assert size(g.double() - truth) <= 2 * size(r.double() - truth) + ulp, name


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


# --- the same model --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_loss_and_every_gradient_are_those_of_the_plain_model(pair, dtype, tied):
    plain, fused = pair(dtype, tie_word_embeddings=tied)
    assert (fused.lm_head.weight is fused.model.embed_tokens.weight) == tied
    assert_equal_to_rounding(plain, fused, batch())


def test_a_frozen_head_gets_no_gradient_and_the_layers_below_the_same(pair):
    plain, fused = pair()
    for model in (plain, fused):
        model.lm_head.weight.requires_grad_(False)
    assert_equal_to_rounding(plain, fused, batch())
    assert fused.lm_head.weight.grad is None


@pytest.mark.parametrize("items", [5, torch.tensor(5), torch.tensor([5.0])])
def test_loss_is_divided_by_num_items_in_batch(pair, items):
    plain, fused = pair()
    inputs = batch() | {"num_items_in_batch": items}
    want, got = plain(**inputs).loss, fused(**inputs).loss
    assert got.shape == want.shape
    torch.testing.assert_close(got, want)


def test_shift_labels_replace_the_shift_of_the_labels(pair):
    plain, fused = pair()
    inputs = batch()
    inputs["shift_labels"] = torch.randint(0, VOCABULARY, inputs["labels"].shape)
    torch.testing.assert_close(fused(**inputs).loss, plain(**inputs).loss)


def test_labels_may_be_given_by_position(pair):
    plain, fused = pair()
    ids, labels = batch().values()
    output = fused(ids, None, None, None, None, labels)
    assert type(output.logits) is LazyLogits
    torch.testing.assert_close(output.loss, plain(ids, labels=labels).loss)


def test_logits_to_keep_gives_the_loss_of_those_positions(pair):
    plain, fused = pair()
    inputs = batch()
    inputs["labels"] = inputs["labels"][:, -5:]
    got, want = fused(**inputs, logits_to_keep=5), plain(**inputs, logits_to_keep=5)
    torch.testing.assert_close(got.loss, want.loss)
    assert got.logits.shape == want.logits.shape == (2, 5, VOCABULARY)


def test_evaluation_without_gradients_has_the_same_loss(pair):
    plain, fused = pair()
    with torch.no_grad():
        torch.testing.assert_close(fused(**batch_of(0)).loss, plain(**batch_of(0)).loss)
    with torch.inference_mode():
        output = fused(**batch_of(0))
        torch.testing.assert_close(output.loss, plain(**batch_of(0)).loss)
        assert torch.equal(output.logits + 0, plain(**batch_of(0)).logits)


def batch_of(seed):
    torch.manual_seed(seed)
    return batch()


def test_gradient_checkpointing_changes_nothing(pair):
    plain, fused = pair()
    for model in (plain, fused):
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_equal_to_rounding(plain, fused, batch() | {"use_cache": False})


def test_autocast_gives_the_loss_and_logits_of_autocast(pair):
    plain, fused = pair()
    inputs = batch()
    with torch.autocast("cpu", torch.bfloat16):
        want, got = plain(**inputs), fused(**inputs)
        torch.testing.assert_close(got.loss, want.loss)
    assert got.logits.dtype == want.logits.dtype == torch.bfloat16
    assert torch.equal(got.logits * 1, want.logits)
    got.loss.backward()
    want.loss.backward()
    torch.testing.assert_close(fused.lm_head.weight.grad, plain.lm_head.weight.grad, rtol=0.05, atol=1e-3)


def test_the_layers_of_a_compiled_model_give_the_same_loss_in_one_graph(pair):
    plain, fused = pair(num_hidden_layers=1)
    inputs = batch() | {"use_cache": False}
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    output = compiled(**inputs)
    torch.testing.assert_close(output.loss, plain(**inputs).loss)
    torch.testing.assert_close(output.logits, plain(**inputs).logits)
    output.loss.backward()


# --- memory ----------------------------------------------------------------------------------------------


def test_no_logits_are_formed_in_a_training_step(pair):
    _, fused = pair()
    fused.lm_head.weight.requires_grad_(False)
    inputs = batch(4, 50)
    inputs["labels"][:, :-2] = -100
    with Largest() as seen:
        fused(**inputs).loss.backward()
    rows = {shape[0] for _, shape in seen.logits}
    assert rows <= {8}, seen.logits  # rows with a label, not all 200


def test_reading_logits_twice_forms_them_once(pair):
    _, fused = pair()
    logits = fused(**batch()).logits
    with Largest() as seen:
        assert torch.equal(logits + 0, logits.float() * 1)
    products = [name for name, _ in seen.logits if "mm" in name]
    assert len(products) == 1


# --- who reads logits ------------------------------------------------------------------------------------


def test_without_labels_the_head_is_an_ordinary_linear_layer(pair):
    plain, fused = pair()
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
    "view": lambda t: t.view(-1, VOCABULARY),
    "transpose": lambda t: t.mT.contiguous(),
    "deepcopy": lambda t: copy.deepcopy(t.detach()),
    "repr": lambda t: torch.tensor(len(repr(t.detach()))),
    "data_ptr": lambda t: torch.tensor(float(t.data_ptr() != 0)),
    "comparison": lambda t: t == t,
    "out of a function": lambda t: torch.empty(t.shape).copy_(t.detach()),
}


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_sees_the_true_logits(pair, reader):
    plain, fused = pair()
    inputs = batch()
    want, got = READERS[reader](plain(**inputs).logits), READERS[reader](fused(**inputs).logits)
    assert type(got) is torch.Tensor
    assert torch.equal(got, want)


def test_a_loss_over_detached_logits_trains_nothing(pair):
    _, fused = pair()
    inputs = batch()
    logits = fused(**inputs).logits.detach()
    assert type(logits) is LazyLogits and not logits.requires_grad
    assert not causal_lm_loss(logits, inputs["labels"], VOCABULARY).requires_grad
    assert not (logits * 1).requires_grad


def test_logits_can_be_saved_and_loaded(pair):
    _, fused = pair()
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
def test_a_loss_of_ones_own_over_the_logits_has_the_true_gradients(pair, through):
    """As TRL does: outputs.logits is read and differentiated, beside the model's own loss."""
    plain, fused = pair()
    inputs = batch()
    for model in (plain, fused):
        output = model(**inputs)
        (output.loss + torch.logsumexp(through(output.logits), -1).mean()).backward()
    for (name, p), q in zip(plain.named_parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_logits_read_after_the_head_was_changed_are_an_error_not_other_logits(pair):
    _, fused = pair()
    output = fused(**batch())
    output.loss.backward()
    torch.optim.SGD(fused.parameters(), 0.1).step()
    with pytest.raises(RuntimeError, match="changed in place"):
        output.logits.sum()


def test_outputs_converted_to_float32_by_accelerate_keep_the_loss_without_logits(pair):
    plain, fused = pair(torch.bfloat16)
    inputs = batch()
    output = convert_outputs_to_fp32(fused.__call__)(**inputs)
    assert type(output.logits) is LazyLogits and output.logits.dtype == torch.float32
    assert torch.equal(output.logits + 0, plain(**inputs).logits.float())
    torch.testing.assert_close(output.loss, plain(**inputs).loss)


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
def test_trainer_trains_and_evaluates_with_the_same_losses(pair, tmp_path, changes):
    logs = []
    for model in pair():
        run = trainer(model, tmp_path, **changes)
        run.train()
        metrics = run.evaluate()
        logs.append([e["loss"] for e in run.state.log_history if "loss" in e] + [metrics["eval_loss"]])
    assert logs[0] == pytest.approx(logs[1], rel=1e-4 if not changes else 1e-2)


@pytest.mark.parametrize("loss_only", [True, False])
def test_trainer_predictions_are_the_logits_and_loss_only_forms_none(pair, tmp_path, loss_only):
    plain, fused = pair()
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


def test_a_peft_model_over_it_has_the_same_loss_and_adapter_gradients(pair):
    losses = []
    for model in pair():
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


def test_generation_is_unaffected(pair):
    plain, fused = pair()
    ids = batch()["input_ids"]
    for settings in ({"do_sample": False}, {"num_beams": 2}, {"do_sample": False, "use_cache": False}):
        arguments = {"max_new_tokens": 5, "pad_token_id": 0, **settings}
        assert torch.equal(fused.generate(ids, **arguments), plain.generate(ids, **arguments))


# --- the model as an object ------------------------------------------------------------------------------


def test_an_attached_model_can_be_copied_and_pickled_and_stays_attached(pair):
    plain, fused = pair()
    for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        output = twin(**batch_of(4))
        assert type(output.logits) is LazyLogits
        torch.testing.assert_close(output.loss, plain(**batch_of(4)).loss)
        detach_head(twin)
        assert type(twin(**batch()).logits) is torch.Tensor


def test_what_is_saved_is_the_plain_model(pair, tmp_path):
    plain, fused = pair()
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


# --- other models ----------------------------------------------------------------------------------------

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
    "Mixtral": {"num_local_experts": 2, "output_router_logits": True},  # its expert loss is added to ours
    "GPTNeoX": {},
    "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32},
}


@pytest.mark.parametrize("name", TAKEN)
def test_models_with_a_plain_linear_head_are_taken(name):
    plain = small(name, **TAKEN[name])
    fused = copy.deepcopy(plain)
    report = attach_head(fused)
    assert report.fused, report
    want, got = plain(**batch_of(6)), fused(**batch_of(6))
    assert type(got.logits) is LazyLogits
    torch.testing.assert_close(got.loss, want.loss)
    want.loss.backward()
    got.loss.backward()
    for (path, p), q in zip(plain.named_parameters(), fused.named_parameters(), strict=True):
        assert (p.grad is None) == (q[1].grad is None)
        if p.grad is not None:
            torch.testing.assert_close(q[1].grad, p.grad, rtol=1e-3, atol=1e-6, msg=path)


REFUSED = {
    "Gemma2": ({"head_dim": 16}, "caps its logits"),
    "Cohere": ({}, "changes its logits before the loss: logits = logits \\* self.logit_scale"),
    "Granite": ({"logits_scaling": 2.0}, "changes its logits before the loss: logits = logits / "),
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
