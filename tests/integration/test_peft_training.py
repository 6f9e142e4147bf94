"""Training an optimised PeftModel: the losses are PEFT's, by hand and in HF Trainer."""

import copy

import pytest
import torch
import transformers

import peft_engine as pe

pytest.importorskip("peft", reason="PEFT is not installed (the peers extra)")
pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (the peers extra)")

pytestmark = pytest.mark.peers

IDS = torch.arange(24).reshape(2, 12) % 101


@pytest.fixture(autouse=True)
def _each_backend(backend):
    """Every test runs with the reference and with the CPU kernels."""


@pytest.fixture(params=["dense", "nf4", "bnb"])
def base(request):
    return request.param


def test_training_steps_follow_peft_loss_by_loss(make, base):
    model = make(base)
    twin = copy.deepcopy(model)
    pe.optimize(model)
    losses = {}
    for m in (model, twin):
        optimizer = torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2)
        losses[m] = []
        for _ in range(8):
            loss = m(input_ids=IDS, labels=IDS).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[m].append(loss.item())
    assert losses[twin][-1] < losses[twin][0] - 0.1
    assert losses[model] == pytest.approx(losses[twin], abs=1e-4)


def test_hf_trainer_trains_saves_and_resumes_an_optimised_model(make, base, tmp_path):
    rows = [{"input_ids": IDS[i % 2], "labels": IDS[i % 2]} for i in range(8)]

    def train(model, steps, resume=None):
        arguments = transformers.TrainingArguments(
            str(tmp_path), max_steps=steps, save_steps=2, per_device_train_batch_size=2, learning_rate=1e-2,
            logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, seed=0,
            lr_scheduler_type="constant",
        )  # fmt: skip
        trainer = transformers.Trainer(model, arguments, train_dataset=rows)
        trainer.train(resume_from_checkpoint=resume)
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    whole, again = make(base), make(base)
    pe.optimize(whole)
    losses = train(whole, 4)
    assert len(losses) == 4 and losses[-1] < losses[0]
    pe.optimize(again)
    assert train(again, 4, resume=str(tmp_path / "checkpoint-2"))[2:] == losses[2:]


def test_fused_layers_compile_without_a_graph_break(make, base):
    model = make(base)
    pe.optimize(model)
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    x = torch.randn(3, 64, requires_grad=True)
    expected = layer(x)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), expected)
