"""The training loop: what a step's loss is, what a run leaves behind, what happens when something breaks."""

import json
import math

import pytest
import torch
from texts import reviews, tiny_tokenizer, write_jsonl

from peft_engine import LoraConfig, attach, load_adapter, optimize, quantize_
from peft_engine.train import trainer as loop
from peft_engine.train.data import pack, read_rows, tokenize
from peft_engine.train.output import last_checkpoint
from peft_engine.train.settings import LoopSettings
from peft_engine.train.trainer import TrainError, train


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def documents(tmp_path, tokenizer):
    return tokenize(read_rows(write_jsonl(tmp_path / "rows.jsonl", reviews(2))), tokenizer, 128)


@pytest.fixture
def model(tiny_llama, tokenizer):
    """A factory: the same tiny model with the same fresh adapter each time."""

    def make(dropout: float = 0.0, quantized: bool = False, adapter=None):
        torch.manual_seed(1)
        made = tiny_llama(vocab_size=len(tokenizer), initializer_range=0.2)
        if quantized:
            quantize_(made)
        if adapter is not None:
            load_adapter(made, adapter, "default")
        else:
            attach(made, LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules="all-linear"))
        optimize(made)
        return made

    return make


def _settings(**changes) -> LoopSettings:
    return LoopSettings(
        **({"batch_size": 4, "learning_rate": 1e-2, "max_steps": 6, "save_steps": 2} | changes)
    )


def _adapter(model) -> dict[str, torch.Tensor]:
    return {path: p.detach().cpu().clone() for path, p in model.named_parameters() if "lora_" in path}


def test_it_learns_and_writes_the_adapter_that_the_model_holds(model, documents, tmp_path):
    made = model()
    outcome = train(made, documents, tmp_path / "out", _settings(max_steps=20))
    assert outcome.losses[-1] < 0.5 * outcome.losses[0]
    assert outcome.steps == len(outcome.losses) == 20
    assert outcome.tokens == 5 * sum(len(d.input_ids) for d in documents)
    assert outcome.labelled_tokens == 5 * sum(d.labelled for d in documents)
    assert outcome.without_gradient == []
    read = _adapter(model(adapter=tmp_path / "out"))
    for path, tensor in _adapter(made).items():
        assert torch.equal(tensor, read[path])


def test_the_loss_of_a_step_does_not_depend_on_its_split_into_micro_batches(model, tmp_path, tokenizer):
    # Completions of unlike lengths: a mean of the means of micro-batches would differ.
    rows = [
        {"prompt": "Review: a film", "completion": " positive" if i % 2 else " fine" + " warm end" * i}
        for i in range(8)
    ]
    documents = tokenize(read_rows(write_jsonl(tmp_path / "rows.jsonl", rows)), tokenizer, 128)
    found = []
    for batch_size, accumulation in ((8, 1), (4, 2), (1, 8)):
        made = model()
        settings = _settings(
            batch_size=batch_size, gradient_accumulation_steps=accumulation, max_steps=2, weight_decay=0.0
        )
        outcome = train(made, documents, tmp_path / f"out{batch_size}", settings)
        found.append(outcome.losses)
    for losses in found[1:]:
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(found[0]), rtol=1e-5, atol=0)


def test_a_seed_decides_the_run_to_the_bit(model, documents, tmp_path):
    losses = {
        (seed, turn): train(
            model(dropout=0.1), documents, tmp_path / f"{seed}{turn}", _settings(seed=seed)
        ).losses
        for seed, turn in ((0, 0), (0, 1), (1, 0))
    }
    assert losses[0, 0] == losses[0, 1]
    assert losses[0, 0] != losses[1, 0]


@pytest.mark.parametrize("quantized", [False, True])
def test_a_resumed_run_is_bit_for_bit_the_run_that_was_not_interrupted(model, documents, tmp_path, quantized):
    whole = model(dropout=0.1, quantized=quantized)
    straight = train(whole, documents, tmp_path / "straight", _settings(max_steps=7, save_steps=3))

    class Killed(Exception):
        pass

    def kill(outcome, total, eval_loss):
        if outcome.steps == 5:
            raise Killed

    with pytest.raises(Killed):
        train(
            model(dropout=0.1, quantized=quantized),
            documents,
            tmp_path / "killed",
            _settings(max_steps=7, save_steps=3),
            watch=kill,
        )
    checkpoint = last_checkpoint(tmp_path / "killed")
    assert checkpoint is not None and checkpoint.name == "checkpoint-3"
    # without one, or with one that is cut short, the run would go on as another one, or not at all
    for file in (
        "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "adapter_config.json",
        "adapter_model.safetensors",
    ):  # fmt: skip
        data = (checkpoint / file).read_bytes()
        (checkpoint / file).unlink()
        assert last_checkpoint(tmp_path / "killed") is None, file
        (checkpoint / file).write_bytes(data[: len(data) // 2])
        assert last_checkpoint(tmp_path / "killed") is None, file
        (checkpoint / file).write_bytes(data)
    torch.manual_seed(99)
    again = model(dropout=0.1, quantized=quantized, adapter=checkpoint)
    resumed = train(
        again, documents, tmp_path / "killed", _settings(max_steps=7, save_steps=3), resume_from=checkpoint
    )
    assert resumed.resumed_from_step == 3
    assert resumed.losses == straight.losses
    for path, tensor in _adapter(whole).items():
        assert torch.equal(tensor, dict(again.named_parameters())[path])


def test_gradients_before_and_after_an_evaluation_are_equal(model, documents):
    made = model(quantized=True).train()

    def gradients():
        made.zero_grad()
        made(**pack(documents[:4]), use_cache=False).loss.backward()
        return {path: p.grad.clone() for path, p in made.named_parameters() if p.requires_grad}

    before = gradients()
    loop.evaluation_loss(made, documents, 4)
    assert made.training
    after = gradients()
    assert before.keys() == after.keys() and any(g.any() for g in before.values())
    assert all(torch.equal(before[path], after[path]) for path in before)


def test_the_evaluation_loss_weighs_every_labelled_token_alike(model, documents):
    made = model()
    losses = [loop.evaluation_loss(made, documents, size) for size in (1, 3, 16)]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


def test_with_evaluation_data_the_best_state_is_what_is_left(model, documents, tmp_path):
    made = model()
    states, evaluated = {}, []

    def watch(outcome, total, eval_loss):
        if eval_loss is not None:
            evaluated.append(outcome.steps)
        if eval_loss is None and outcome.steps == 7:  # from here on it is worse
            with torch.no_grad():
                for path, parameter in made.named_parameters():
                    if "lora_B" in path:
                        parameter.mul_(-3)
        if eval_loss is not None:
            states[outcome.steps] = eval_loss, _adapter(made)

    outcome = train(
        made,
        documents,
        tmp_path / "out",
        _settings(max_steps=8, eval_steps=1),
        eval_documents=documents[:5],
        watch=watch,
    )
    assert evaluated == list(range(1, 9))  # at the end of an epoch, too, once
    best = min(states, key=lambda step: states[step][0])
    assert outcome.saved == "best" and outcome.best_step == best
    assert outcome.eval_losses == {step: loss for step, (loss, _) in states.items()}
    assert best == 6
    read = _adapter(model(adapter=tmp_path / "out"))
    for path, tensor in states[best][1].items():
        assert torch.equal(tensor, read[path])


def test_checkpoints_hold_the_adapter_not_the_model_and_the_last_two_are_kept(model, documents, tmp_path):
    train(model(), documents, tmp_path / "out", _settings())
    kept = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert kept == ["adapter_config.json", "adapter_model.safetensors", "checkpoint-4", "checkpoint-6"]
    for name in ("checkpoint-4", "checkpoint-6"):
        files = {p.name for p in (tmp_path / "out" / name).iterdir()}
        assert {
            "adapter_config.json",
            "adapter_model.safetensors",
            "optimizer.pt",
            "trainer_state.json",
        } <= files
        assert not any(f.startswith("model") for f in files)


# --- what breaks --------------------------------------------------------------------------------------------


def _poison_at(step, made, path):
    def watch(outcome, total, eval_loss):
        if outcome.steps == step:
            with torch.no_grad():
                made.get_parameter(path).flatten()[0] = math.nan

    return watch


def test_nan_in_the_loss_stops_names_the_first_layer_and_keeps_the_last_good_checkpoint(
    model, documents, tmp_path
):
    made = model()
    path = "model.layers.1.mlp.up_proj.lora_A.default"
    with pytest.raises(TrainError) as error:
        train(made, documents, tmp_path / "out", _settings(), watch=_poison_at(3, made, path))
    assert "step 4" in str(error.value) and "model.layers.1.mlp" in str(error.value)
    checkpoint = last_checkpoint(tmp_path / "out")
    assert (
        checkpoint is not None and checkpoint.name == "checkpoint-2" and str(checkpoint) in str(error.value)
    )
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert all(t.isfinite().all() for t in _adapter(model(adapter=checkpoint)).values())


def test_a_gradient_that_is_not_finite_stops_before_it_reaches_the_weights(model, documents, tmp_path):
    made = model()
    weight = made.get_parameter("model.layers.0.mlp.down_proj.lora_B.default")
    weight.register_hook(lambda grad: grad * math.inf)
    with pytest.raises(
        TrainError, match=r"step 1: the gradient is not finite, first in model\.layers\.0\.mlp\.down_proj"
    ):
        train(made, documents, tmp_path / "out", _settings())
    assert not weight.any()


def test_an_adapter_cut_off_from_the_loss_is_an_error_at_the_first_step(model, documents, tmp_path):
    made = model()
    for path, parameter in made.named_parameters():
        if "lora_" in path:
            parameter.register_hook(torch.zeros_like)
    with pytest.raises(TrainError, match="no tensor of the adapter has a gradient"):
        train(made, documents, tmp_path / "out", _settings())


@pytest.mark.parametrize("broken", ["adapter", "optimizer"])
def test_a_disk_that_fills_while_saving_keeps_the_checkpoint_before(
    model, documents, tmp_path, monkeypatch, broken
):
    made = model()
    real = {"adapter": loop.save_adapter, "optimizer": torch.save}[broken]
    calls = []

    def full(*args, **kwargs):
        calls.append(args)
        if len(calls) > (1 if broken == "adapter" else 3):
            if broken == "adapter":
                raise OSError(28, "No space left on device")
            raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")
        return real(*args, **kwargs)

    monkeypatch.setattr(*((loop, "save_adapter") if broken == "adapter" else (torch, "save")), full)
    says = r"saving .*checkpoint-4 failed.*checkpoint-2, is whole; free some space .*--resume"
    with pytest.raises(TrainError, match=says):
        train(made, documents, tmp_path / "out", _settings())
    monkeypatch.undo()
    left = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert left == ["checkpoint-2"]
    again = model(adapter=tmp_path / "out" / "checkpoint-2")
    outcome = train(
        again, documents, tmp_path / "out", _settings(), resume_from=last_checkpoint(tmp_path / "out")
    )
    assert outcome.steps == 6


def test_a_folder_that_is_taken_away_is_no_full_disk(model, documents, tmp_path, monkeypatch):
    def gone(*args, **kwargs):
        raise FileNotFoundError(2, "No such file or directory", "x")

    monkeypatch.setattr(loop, "save_adapter", gone)
    with pytest.raises(TrainError, match=r"no checkpoint before it; mend that and run again$"):
        train(model(), documents, tmp_path / "out", _settings())


def test_memory_that_runs_out_is_an_error_with_the_smaller_settings(model, documents, tmp_path):
    made = model()

    def full(module, args):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")

    made.model.layers[1].register_forward_pre_hook(full)
    with pytest.raises(
        TrainError, match=r"out of memory at step 1.*--batch-size 2 --gradient-accumulation-steps 2"
    ):
        train(made, documents, tmp_path / "out", _settings())


def test_a_checkpoint_records_what_the_caller_adds(model, documents, tmp_path):
    def add(folder):
        (folder / "run.json").write_text(json.dumps({"settings": {}}))

    train(model(), documents, tmp_path / "out", _settings(max_steps=2), on_checkpoint=add)
    assert (tmp_path / "out" / "checkpoint-2" / "run.json").is_file()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"batch_size": 0}, r"--batch-size: expected at least 1, below 2\^31, got 0"),
        ({"max_steps": 10**20}, r"--max-steps: expected at least 1, below 2\^31, got 1000"),
        ({"epochs": 0}, "--epochs"),
        ({"epochs": 1e300}, r"--epochs: expected a number above 0, below 2\^31, got 1e\+300"),
        ({"learning_rate": math.nan}, "--learning-rate"),
        ({"learning_rate": 1e300}, "--learning-rate"),
        ({"weight_decay": math.inf}, "--weight-decay"),
        ({"max_grad_norm": math.inf}, "--max-grad-norm"),
        ({"warmup_ratio": 1.5}, "--warmup-ratio"),
        ({"scheduler": "cosin"}, "--scheduler: expected one of cosine, linear"),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_the_option_name(changes, says):
    with pytest.raises(ValueError, match=says):
        LoopSettings(**changes)
