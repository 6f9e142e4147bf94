"""A tiny tokenizer and a few rows, made on the spot, for the tests of training and of the command."""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

GOOD = "a fine warm film", "fine acting and a warm end", "i like this warm film", "a film with fine acting"
BAD = "a dull cold film", "dull acting and a cold end", "i hate this cold film", "a film with dull acting"
CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def tiny_tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    """Byte-level BPE with about 300 tokens; eos is </s>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    lines = [f"Review: {text}\nSentiment: positive negative" for text in (*GOOD, *BAD)]
    tokenizer.train_from_iterator(lines * 3, trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    made.chat_template = CHAT if chat else None
    return made


def reviews(copies: int = 1) -> list[dict[str, str]]:
    """Rows of two classes that a tiny model learns in a few steps."""
    pairs = [(text, " positive") for text in GOOD] + [(text, " negative") for text in BAD]
    return [{"prompt": f"Review: {text}\nSentiment:", "completion": label} for text, label in pairs * copies]


def write_jsonl(path: Path, rows: Iterable[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def tiny_model_folder(folder: Path) -> Path:
    """A two-layer Llama with random weights and the tiny tokenizer, as save_pretrained writes them."""
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=len(tokenizer), max_position_embeddings=128,
        initializer_range=0.2, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def tiny_encoder_decoder_folder(kind: str, folder: Path) -> Path:
    """A two-layer "t5" or "bart" with random weights, and a tokenizer that ends a text as theirs do."""
    tokenizer = tiny_tokenizer(chat=False)
    template = {"t5": "$A </s>", "bart": "<s> $A </s>"}[kind]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=template, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    size = {"d_model": 64, "vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": 2}
    if kind == "t5":
        config: transformers.PreTrainedConfig = transformers.T5Config(
            **size, d_kv=16, d_ff=96, num_layers=2, num_heads=4, decoder_start_token_id=0, dropout_rate=0.0
        )
    else:
        sides = {
            f"{side}_{key}": value
            for side in ("encoder", "decoder")
            for key, value in {"layers": 2, "ffn_dim": 96, "attention_heads": 4}.items()
        }
        config = transformers.BartConfig(
            **size, **sides, max_position_embeddings=64, bos_token_id=1, decoder_start_token_id=2,
            forced_bos_token_id=1, forced_eos_token_id=2, init_std=0.2, dropout=0.0,
        )  # fmt: skip
    transformers.AutoModelForSeq2SeqLM.from_config(config).save_pretrained(folder)
    return folder
