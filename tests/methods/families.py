"""Small models of each family with random weights, and inputs that fit them."""

from typing import Any

import torch
import transformers

VOCABULARY = 101
# What the families call the same things.
SIZES = {
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "layers": ("num_hidden_layers", "n_layer", "num_layers"),
}

LLAMA = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 64, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
BERT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "vocab_size": VOCABULARY, "max_position_embeddings": 64, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0, "pad_token_id": 0,
}  # fmt: skip
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", LLAMA),
    "qwen2": ("Qwen2Config", LLAMA),
    "mistral": ("MistralConfig", LLAMA | {"sliding_window": 5}),
    "gpt2": (
        "GPT2Config",
        {
            "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 64,
            "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2,
            "pad_token_id": 0,
        },
    ),
    "falcon": (
        "FalconConfig",
        {
            "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCABULARY,
            "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
        },
    ),
    "bloom": ("BloomConfig", {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY}),
    "bert": ("BertConfig", BERT),
    "roberta": ("RobertaConfig", BERT | {"pad_token_id": 1, "max_position_embeddings": 66}),
    "t5": (
        "T5Config",
        {
            "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": VOCABULARY,
            "dropout_rate": 0.0, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0,
        },
    ),
    "bart": (
        "BartConfig",
        {
            "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
            "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
            "vocab_size": VOCABULARY, "max_position_embeddings": 64, "dropout": 0.0, "pad_token_id": 1,
            "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": None,
        },
    ),
}  # fmt: skip
DECODERS = ("llama", "qwen2", "mistral", "gpt2")
ENCODERS = ("bert", "roberta")
ENCODER_DECODERS = ("t5", "bart")
FAMILIES = (*DECODERS, *ENCODERS, *ENCODER_DECODERS)
LABELS = 3


def build(family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A model with the weights of a seed; encoders come with a classification head."""
    torch.manual_seed(seed)
    kind, settings = CONFIGS[family]
    if family in ENCODERS:
        changes = {"num_labels": LABELS, **changes}
    config = getattr(transformers, kind)(**(settings | changes))
    if family in ENCODERS:
        auto: Any = transformers.AutoModelForSequenceClassification
    elif family in ENCODER_DECODERS:
        auto = transformers.AutoModelForSeq2SeqLM
    else:
        auto = transformers.AutoModelForCausalLM
    model = auto.from_config(config, dtype=dtype).eval()
    if (
        family == "t5"
    ):  # its init is tuned for other sizes: logits of some size make a test of more than noise
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.normal_(0, 0.2)
    return model


def task_type(family: str) -> str:
    if family in ENCODERS:
        return "SEQ_CLS"
    return "SEQ_2_SEQ_LM" if family in ENCODER_DECODERS else "CAUSAL_LM"


def inputs(family: str, rows: int = 4, tokens: int = 7, seed: int = 0, pad: str = "right") -> dict[str, Any]:
    """input_ids, attention_mask and labels; the rows after the first end (or start) in padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (rows, tokens), generator=generator)
    mask = torch.ones(rows, tokens, dtype=torch.long)
    for row in range(1, rows):
        short = row % min(4, tokens)
        where = slice(tokens - short, None) if pad == "right" else slice(0, short)
        mask[row, where] = 0
    padding = build_padding(family)
    ids = ids.masked_fill(mask == 0, padding)
    if family in ENCODERS:
        labels = torch.randint(0, LABELS, (rows,), generator=generator)
    elif family in ENCODER_DECODERS:
        labels = torch.randint(3, VOCABULARY, (rows, tokens - 2), generator=generator)
        labels[1:, -1] = -100
    else:
        labels = ids.masked_fill(mask == 0, -100)
        labels[
            :, 0
        ] = -100  # nothing here predicts a row's first token; behind a prompt PEFT's last vector does
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def build_padding(family: str) -> int:
    return CONFIGS[family][1]["pad_token_id"]
