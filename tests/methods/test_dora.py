"""DoRA on a model: PEFT's results, what is kept of the norm, and the promises that LoRA gives."""

import copy

import numpy as np
import pytest
import torch
from method_cases import IDS, edit_weights, quantized, refused, shake
from torch import nn

import peft_engine as pe
from peft_engine.methods import derived, dora
from peft_engine.methods.attach import tensors
from peft_engine.methods.lora import MANY_ROWS

DORA = pe.LoraConfig(r=4, lora_alpha=12, target_modules="all-linear", use_dora=True)


@pytest.mark.peers
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_outputs_and_gradients_are_pefts(tiny_llama, backend, dropout):
    peft = pytest.importorskip("peft", reason="PEFT is not installed (the peers extra)")
    settings = dict(r=4, lora_alpha=12, target_modules="all-linear", use_dora=True, lora_dropout=dropout)
    model = tiny_llama(attention_bias=True).train()
    theirs = copy.deepcopy(model)
    torch.manual_seed(7)
    pe.attach(model, pe.LoraConfig(**settings))
    torch.manual_seed(7)
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(**settings))
    own = {key.replace(".default", ""): p for key, p in theirs.named_parameters() if p.requires_grad}
    own = {
        key.removeprefix("base_model.model.").replace("vector.weight", "vector"): p for key, p in own.items()
    }
    mine = tensors(model, "default")
    assert mine.keys() == own.keys()
    assert all(
        torch.allclose(mine[path], own[path], rtol=1e-6) for path in mine
    )  # norms: another order of sums
    shake(model)
    with torch.no_grad():
        for path in mine:
            own[path].copy_(mine[path])
    for side in (model, theirs):
        torch.manual_seed(3)  # the dropout's
        side(IDS, labels=IDS).loss.backward()
    for path in mine:
        torch.testing.assert_close(mine[path].grad, own[path].grad, rtol=2e-4, atol=1e-6)
    torch.testing.assert_close(model.eval()(IDS).logits, theirs.eval()(IDS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("nf4", [False, True])
def test_a_fresh_adapter_is_the_base(tiny_llama, backend, dtype, nf4):
    model = tiny_llama(dtype)
    model = quantized(model) if nf4 else model
    before = model(IDS).logits
    pe.attach(model, DORA)
    if nf4:
        assert torch.equal(model(IDS).logits, before)
    torch.testing.assert_close(model(IDS).logits, before)
    assert (model.model.layers[0].mlp.up_proj.lora_magnitude_vector["default"] > 0).all()


def layer(**changes) -> nn.Sequential:
    """A linear layer with a DoRA adapter off its start, in evaluation."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48))
    model.config = {"model_type": "none"}
    pe.attach(
        model, pe.LoraConfig(r=4, target_modules=["0"], use_dora=True, init_lora_weights=False, **changes)
    )
    return model.eval()


def exact(model: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    """The layer's output by its definition."""
    linear = model[0]
    a, b, m = (t["default"].double() for t in (linear.lora_A, linear.lora_B, linear.lora_magnitude_vector))
    weight = linear.weight.double() + linear.lora["default"].scaling * b @ a
    weight = m[:, None] * weight / weight.norm(dim=1, keepdim=True)
    return (x.double() @ weight.t() + linear.bias.double()).float()


def agrees(model: nn.Sequential) -> None:
    x = torch.randn(3, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(x), exact(model, x), rtol=1e-5, atol=1e-5)


def test_the_norm_is_kept_in_evaluation_until_something_changes(monkeypatch):
    model, formed = layer(), []
    monkeypatch.setattr(dora, "dora_norm", lambda *a, f=dora.dora_norm, **k: formed.append(1) or f(*a, **k))
    for _ in range(3):
        agrees(model)
    assert len(formed) == 1
    changes = {
        "A": lambda: model[0].lora_A["default"].add_(1.0),
        "B": lambda: model[0].lora_B["default"].mul_(2.0),
        "the weight": lambda: model[0].weight.mul_(2.0),
        "a new A": lambda: model[0].lora_A.update({"default": nn.Parameter(torch.randn(4, 64))}),
        "the state": lambda: model.load_state_dict({k: v + 0.1 for k, v in model.state_dict().items()}),
        "a move": lambda: model.double().float(),
        "train, a write that torch does not count, eval": lambda: (
            model.train(), model[0].lora_B["default"].data.add_(1.0), model.eval()
        ),
    }  # fmt: skip
    for count, change in enumerate(changes.values(), 2):
        with torch.no_grad():
            change()
        agrees(model)
        agrees(model)
        assert len(formed) == count
    model.train()
    agrees(model)
    agrees(model)
    assert len(formed) == count + 2


def test_a_fused_optimizer_s_steps_are_seen_in_evaluation_mode_too():
    """torch counts no version of what they write."""
    model, twin = layer(), layer()
    x, losses = torch.randn(8, 64), []
    for side, fused in ((model, True), (twin, False)):
        trained = [p for p in side.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=0.1, fused=fused)
        for _ in range(4):
            loss = side(x).square().mean()
            losses.append(loss.item())
            loss.backward()
            agrees(side)  # without gradients, before the step and after it
            optimizer.step()
            optimizer.zero_grad()
            agrees(side)
    assert losses[:4] == pytest.approx(losses[4:], rel=1e-4)


def test_memory_that_another_tensor_has_now_is_not_taken_for_it():
    model = layer()
    agrees(model)
    a, parameters = model[0].lora_A["default"], model[0].lora_A
    held = model[0].__dict__[derived.KEPT]
    twin = nn.Parameter(a.detach().clone())
    with torch.no_grad():
        twin.mul_(3.0)
    parameters["default"] = twin
    # As if the new one lay where the old one did, written to as often.
    state, refs, value = held["norm", "default"]
    state = (*state[:2], (twin.data_ptr(), twin._version), *state[3:])
    held["norm", "default"] = state, refs, value
    agrees(model)


def test_a_parameter_that_moves_back_to_its_old_address_is_not_taken_for_what_it_was():
    """As model.half().float() does when the allocator hands the freed memory out again."""
    model = layer()
    a, memory = model[0].lora_A["default"], np.empty((4, 64), np.float32)
    memory[:] = a.detach()
    a.data = torch.from_numpy(memory)
    agrees(model)
    before = a.data_ptr(), a._version
    memory *= 3.0
    a.data = torch.from_numpy(memory)
    assert (a.data_ptr(), a._version) == before
    agrees(model)


def test_what_torch_compile_takes_is_of_the_weights_that_were_loaded():
    model, other = layer(), layer()
    with torch.no_grad():
        other[0].weight.mul_(3.0)
    model.load_state_dict(other.state_dict())
    assert torch.equal(derived.found(model[0], derived.BASE), dora.row_squares(other[0].weight))


def test_a_write_through_data_is_seen_in_training():
    model = layer().train()
    agrees(model)
    model[0].lora_B["default"].data.add_(1.0)
    agrees(model)


def test_a_name_that_is_given_again_has_a_norm_of_its_own():
    model = layer()
    agrees(model)
    for _ in range(3):  # memory that is given back is often given again
        pe.detach(model)
        assert derived.KEPT not in model[0].__dict__
        pe.attach(model, pe.LoraConfig(r=4, target_modules=["0"], use_dora=True, init_lora_weights=False))
        model.eval()
        shake(model)
        agrees(model)


def test_what_is_kept_is_not_copied_and_survives_inference_mode():
    model = layer()
    with torch.inference_mode():
        model(torch.randn(2, 64))
    twin = copy.deepcopy(model)
    assert not twin[0].__dict__[derived.KEPT] and model[0].__dict__[derived.KEPT]
    agrees(twin)
    model(torch.randn(2, 64)).sum().backward()  # the norm that inference mode left is saved for it
    assert model[0].lora_magnitude_vector["default"].grad.any()


def test_merging_another_adapter_changes_the_norm():
    model = layer()
    pe.attach(model, pe.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False), name="other")
    pe.active(model, "default")
    agrees(model)
    pe.merge_(model, "other")
    pe.active(model, "default")
    agrees(model)


@pytest.mark.parametrize("nf4", [False, True])
@pytest.mark.parametrize("rows", [1, MANY_ROWS])
def test_a_row_of_a_mixed_batch_has_the_bits_of_the_batch_under_its_adapter(tiny_llama, nf4, rows):
    model = tiny_llama()
    model = quantized(model) if nf4 else model
    names = ["dora", None, "lora", "dora"]
    pe.attach(model, DORA, name="dora")
    pe.attach(model, pe.LoraConfig(r=3, target_modules="all-linear"), name="lora")
    for seed, name in enumerate(("dora", "lora")):
        shake(model, name, seed)
    ids = torch.arange(4 * rows).view(4, rows) % 101
    with torch.no_grad():
        with pe.active(model, names):
            mixed = model(ids).logits
        for i, name in enumerate(names):
            with pe.active(model, name):
                assert torch.equal(model(ids).logits[i], mixed[i])


def test_training_the_magnitude_alone_is_worth_saving(llama, tmp_path):
    model = pe.attach(llama(), DORA)
    with pytest.raises(ValueError, match="untouched by training: every B is zero"):
        pe.save_adapter(model, tmp_path / "fresh")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.lora_magnitude_vector["default"].mul_(1.5)
    pe.save_adapter(model, tmp_path / "scaled")
    again = llama()
    pe.load_adapter(again, tmp_path / "scaled")
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_magnitudes_that_are_missing_or_of_another_shape_are_listed(llama, tmp_path):
    folder = pe.save_adapter(shake(pe.attach(llama(), DORA)), tmp_path / "adapter")
    key = "base_model.model.model.layers.0.mlp.up_proj.lora_magnitude_vector"
    edit_weights(folder, lambda t: t | {key: t[key][1:].clone()})
    refused(llama(), folder, rf"of another shape: {key} must be \(\d+,\), got")
    edit_weights(folder, lambda t: {k: v for k, v in t.items() if k != key})
    refused(llama(), folder, f"missing: {key}")


def test_names_from_a_raw_state_dict_of_peft_land(llama, tmp_path):
    folder = pe.save_adapter(shake(pe.attach(llama(), DORA)), tmp_path / "adapter")
    expected = llama()
    pe.load_adapter(expected, folder)
    edit_weights(folder, lambda t: {
        k.replace("vector", "vector.default.weight").replace("_A.w", "_A.default.w"): v for k, v in t.items()
    })  # fmt: skip
    again = llama()
    pe.load_adapter(again, folder)
    assert torch.equal(again(IDS).logits, expected(IDS).logits)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_model_has_the_gradients_of_a_plain_one(tiny_llama, reentrant):
    config = pe.LoraConfig(r=4, target_modules="all-linear", use_dora=True, lora_dropout=0.3)
    model = shake(pe.attach(tiny_llama(), config)).train()
    twin = copy.deepcopy(model)
    twin.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        twin.enable_input_require_grads()
    for side in (model, twin):
        torch.manual_seed(2)
        side(IDS, labels=IDS).loss.backward()
    for mine, theirs in zip(
        tensors(twin, "default").values(), tensors(model, "default").values(), strict=True
    ):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-7)


def test_the_report_names_the_op(tiny_llama, backend):
    model = pe.attach(quantized(tiny_llama()), DORA)
    lines = [line for line in pe.explain(model).layers if line.op == "dora_linear"]
    assert len(lines) == 14 and {line.backend for line in lines} == {backend}
    pe.active(model, None)
    assert not [line for line in pe.explain(model).layers if line.op == "dora_linear"]


def test_use_dora_must_be_a_bool():
    with pytest.raises(TypeError, match="use_dora must be True or False, got 'yes'"):
        pe.LoraConfig(use_dora="yes")
