"""Small mixtures of experts, and what their tests share."""

import torch
import transformers

import peft_engine as pe

BOTH = ["experts.gate_up_proj", "experts.down_proj"]
IDS = torch.arange(24).reshape(2, 12) * 5 % 120
FAMILIES = {
    "olmoe": (transformers.OlmoeConfig, {"num_experts": 6}),
    "mixtral": (transformers.MixtralConfig, {"num_local_experts": 6}),
    "qwen3_moe": (
        transformers.Qwen3MoeConfig,
        {"num_experts": 6, "moe_intermediate_size": 128, "head_dim": 16, "norm_topk_prob": True},
    ),
}
# With a first layer that has no experts, and a shared expert beside the others.
SHARED = {
    "n_routed_experts": 6, "moe_intermediate_size": 64, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "n_shared_experts": 1,
}  # fmt: skip
LATENT = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}
MORE = {
    "glm4_moe": (transformers.Glm4MoeConfig, SHARED | {"head_dim": 16}),
    "deepseek_v3": (transformers.DeepseekV3Config, SHARED | LATENT | {"num_key_value_heads": 4}),
    "ernie4_5_moe": (
        transformers.Ernie4_5_MoeConfig,
        {"moe_num_experts": 6, "moe_k": 2, "moe_intermediate_size": 64, "moe_layer_start_index": 1},
    ),
}


def build(family="olmoe", dtype=torch.float32, width=128):
    config, special = (FAMILIES | MORE)[family]
    settings = {
        "hidden_size": 64, "intermediate_size": width, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_experts_per_tok": 2, "vocab_size": 128, "eos_token_id": 1,
        "pad_token_id": 0, "bos_token_id": 1,
    }  # fmt: skip
    torch.manual_seed(0)
    made = config(**(settings | special))
    model = transformers.AutoModelForCausalLM.from_config(made).to(dtype).eval()
    for parameter in model.parameters():  # norms are all ones otherwise, and routers may be zeros
        torch.nn.init.normal_(parameter, 0.0 if parameter.dim() >= 2 else 0.7, 0.1)
    return model


def lora(**settings):
    given = {"r": 4, "target_modules": ["q_proj"], "target_parameters": BOTH, "init_lora_weights": False}
    return pe.LoraConfig(**(given | settings))


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def layer_of(model):
    return model.model.layers[-1].mlp.experts
