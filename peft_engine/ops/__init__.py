"""The ops: each file holds the maths (docstring), a plain-torch reference, and the autograd.Function."""

from peft_engine.ops.bottleneck import bottleneck
from peft_engine.ops.dora_linear import dora_linear
from peft_engine.ops.linear_cross_entropy import linear_cross_entropy
from peft_engine.ops.lora_linear import lora_linear
from peft_engine.ops.nf4 import NF4Tensor, nf4_dequantize, nf4_quantize
from peft_engine.ops.prefix_attention import prefix_attention
from peft_engine.ops.prompt_embedding import prompt_embedding

__all__ = [
    "NF4Tensor",
    "bottleneck",
    "dora_linear",
    "linear_cross_entropy",
    "lora_linear",
    "nf4_dequantize",
    "nf4_quantize",
    "prefix_attention",
    "prompt_embedding",
]
