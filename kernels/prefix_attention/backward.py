"""The gradients of prefix_attention (Dao 2023, arXiv 2307.08691): scores anew from q, k and the saved lse.

    dq_kernel      a tile of packed rows over all its keys; also delta = sum(dout out), for those that follow
    dkv_kernel     a block of real keys over the rows that see it, of all heads of its group
    prefix_kernel  a block of the prefix over a share of the rows, of the whole batch where it has one prefix;
                   sum_kernel adds the shares up in order, in float32

Floor: operations, 2.5 times the forward's; scores and dP are made twice, in dq and in dkv, so 3.5 are done.
"""

import torch
from peft_engine.kernels.prefix_attention.call import Call
from peft_engine.kernels.prefix_attention.dkv import gradient_of_prefix, gradient_of_real
from peft_engine.kernels.prefix_attention.dq import gradient_of_queries

from peft_engine.ops.attention import by_token


def backward(
    dout, q, k, v, prefix_k, prefix_v, out, lse, first, last, bias, causal: bool, scale: float,
    dropout_p=0.0, seed=None, softcap=0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """dq, dk, dv, dprefix_k, dprefix_v; the arguments of the raw op prefix_attention_backward."""
    dq, dk, dv = by_token(q), by_token(k), by_token(v)
    shares = torch.empty_like(prefix_k, memory_format=torch.contiguous_format)
    grads = dq, dk, dv, shares, torch.empty_like(shares)
    if not q.numel():
        for t in grads:
            t.zero_()
        return grads
    call = Call(q, k, v, prefix_k, prefix_v, first, last, bias, causal, dropout_p, seed, softcap)
    delta = torch.empty_like(lse)
    gradient_of_queries(call, dout, out, lse, delta, dq, scale)
    if k.shape[2]:
        gradient_of_real(call, dout, lse, delta, dk, dv, scale)
    if prefix_k.shape[2]:
        gradient_of_prefix(call, dout, lse, delta, *grads[3:], scale)
    return grads
