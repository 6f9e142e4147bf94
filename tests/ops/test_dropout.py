"""dropout on every instruction set: the mask of its hash, one rounding, its own backward."""

import copy

import pytest
import torch
from accuracy import assert_twice_as_good
from hypothesis import given, settings
from hypothesis import strategies as st

import peft_engine as pe
from peft_engine.dropout import FusedDropout
from peft_engine.ops.dropout import draw_seed, dropout, dropout_mask, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEED = torch.tensor([0x1234_5678_9ABC_DEF0])


def check(x, p):
    x = x.detach().requires_grad_()
    dy = torch.randn(x.shape).to(x.dtype)
    y = dropout(x, p, SEED)
    (dx,) = torch.autograd.grad(y, x, dy)
    for got, of in ((y, x), (dx, dy)):
        assert got.dtype == x.dtype and got.shape == x.shape
        plain, exact = reference(of, p, SEED), reference(of.double(), p, SEED)
        assert_twice_as_good(got.detach(), plain.detach(), exact.detach())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1536), (2, 3, 17), (130, 64), (1,), (), (5, 1031), (70, 1000)])
def test_output_and_gradient_are_those_of_the_mask(isa, shape, dtype):
    for p in (0.1, 0.5, 0.99):
        check(torch.randn(shape).to(dtype), p)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 70), st.integers(1, 200), st.sampled_from(DTYPES), st.floats(0.001, 0.999))
def test_any_shape_and_probability(rows, n, dtype, p):
    check(torch.randn(rows, n).to(dtype), p)


def test_what_is_dropped_is_what_the_hash_says(isa):
    y = dropout(torch.ones(300, 2001), 0.25, SEED)
    assert torch.equal(y != 0, dropout_mask(SEED, 300, 2001, 0.25))
    assert abs((y != 0).float().mean() - 0.75) < 0.005 and torch.allclose(y[y != 0], torch.tensor(4 / 3))


def test_nan_and_inf_that_are_dropped_leave_no_trace(isa):
    x = torch.full((4, 64), torch.nan)
    y = dropout(x, 0.5, SEED)
    assert torch.equal(y.isnan(), dropout_mask(SEED, 4, 64, 0.5))


def test_strides_and_empty_tensors(isa):
    x = torch.randn(40, 6).t()
    assert torch.equal(dropout(x, 0.3, SEED), dropout(x.contiguous(), 0.3, SEED))
    dy = torch.ones(()).expand(6, 40)
    x.requires_grad_()
    (dx,) = torch.autograd.grad(dropout(x, 0.3, SEED), x, dy)
    assert torch.equal(dx, dropout(torch.ones(6, 40), 0.3, SEED))
    for shape in ((0, 3), (3, 0), (0,)):
        assert dropout(torch.empty(shape), 0.3, SEED).shape == shape
    assert dropout(x, 0.0, None) is x


def test_the_bits_are_those_of_any_number_of_threads():
    x, before = torch.randn(513, 300), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(dropout(x, 0.1, SEED))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], y) for y in results[1:])


def test_wrong_arguments_are_named():
    with pytest.raises(
        TypeError, match=r"dropout: x must be float32, bfloat16 or float16, got torch\.float64"
    ):
        dropout(torch.ones(2, dtype=torch.float64), 0.1, SEED)
    with pytest.raises(ValueError, match=r"dropout: dropout_p must be in \[0, 1\), got 1.0"):
        dropout(torch.ones(2), 1.0, SEED)
    with pytest.raises(ValueError, match="dropout: dropout needs seed"):
        dropout(torch.ones(2), 0.1, None)


def test_the_gradient_has_a_gradient():
    x = torch.randn(5, 7, requires_grad=True)
    (dx,) = torch.autograd.grad((dropout(x, 0.3, SEED) ** 2).sum(), x, create_graph=True)
    (again,) = torch.autograd.grad(dx.sum(), x)
    torch.testing.assert_close(again, 2 * dropout(dropout(torch.ones(5, 7), 0.3, SEED), 0.3, SEED))


def test_the_raw_op_passes_opcheck():
    torch.library.opcheck(torch.ops.peft_engine.dropout.default, (torch.randn(3, 5), 0.5, SEED))


# --- the layer ----------------------------------------------------------------------------------------------


def test_optimize_makes_one_of_a_dropout_layer_and_unoptimize_takes_it_back():
    kinds = torch.nn.Dropout(0.5), torch.nn.Dropout(0.0), torch.nn.Dropout(0.5, inplace=True)
    layers = torch.nn.Sequential(*kinds, torch.nn.ReLU())
    report = pe.optimize(layers)
    assert [type(m) for m in layers] == [FusedDropout, torch.nn.Dropout, torch.nn.Dropout, torch.nn.ReLU]
    (line,) = [line for line in report.layers if line.op == "dropout"]
    assert line.fused and line.backend == "cpu" and line.kind == "torch.Dropout"
    assert str(layers[0]) == "FusedDropout(p=0.5, inplace=False)"
    pe.unoptimize(layers)
    assert type(layers[0]) is torch.nn.Dropout
    (line,) = [line for line in pe.explain(layers).layers if line.op == "dropout"]
    assert not line.fused and "optimize(model) fuses it" in line.reason


def test_the_layer_draws_from_torchs_generator_and_passes_in_evaluation():
    layer, x = torch.nn.Sequential(torch.nn.Dropout(0.5)), torch.randn(20, 30)
    pe.optimize(layer)
    torch.manual_seed(1)
    y = layer(x)
    torch.manual_seed(1)
    assert torch.equal(copy.deepcopy(layer)(x), y)
    assert not torch.equal(layer(x), y)
    assert layer.eval()(x) is x
    checkpointed = torch.utils.checkpoint.checkpoint(layer.train(), x.requires_grad_(), use_reentrant=False)
    (dx,) = torch.autograd.grad(checkpointed, x, torch.ones(20, 30))
    assert torch.equal(dx != 0, checkpointed != 0)


@pytest.mark.parametrize("change", ["double", "compile", "all"])
def test_what_the_op_does_not_take_is_torchs(change):
    layer = torch.nn.Sequential(torch.nn.Dropout(0.5))
    pe.optimize(layer)
    x = torch.ones(50, 40, dtype=torch.float64 if change == "double" else torch.float32)
    if change == "all":
        layer[0].p = 1.0
        assert not layer(x).any()
        return
    run = torch.compile(layer, fullgraph=True, backend="eager") if change == "compile" else layer
    y = run(x)
    assert 0.3 < (y != 0).double().mean() < 0.7 and torch.equal(y[y != 0], torch.full_like(y[y != 0], 2.0))


def test_seeds_are_drawn_only_where_something_is_dropped():
    assert draw_seed(0.0, torch.device("cpu")) is None
    assert draw_seed(0.1, torch.device("cpu")).dtype == torch.int64
