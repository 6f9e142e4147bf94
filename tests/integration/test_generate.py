"""Text from a model: what decides the next token, what is refused before it, and how it ends."""

import pytest
import torch
import transformers
from texts import reviews, tiny_model_folder

from peft_engine.train.generate import Sampling, generate, stream

PROMPTS = [row["prompt"] for row in reviews()[:3]]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = tiny_model_folder(tmp_path_factory.mktemp("model"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval(), tokenizer


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "own",
    [
        {"num_beams": 3},
        {"repetition_penalty": 2.0, "min_new_tokens": 9, "no_repeat_ngram_size": 1},
        {"stop_strings": ["a"]},
        {"suppress_tokens": [*range(5, 300)]},
        {"do_sample": True, "temperature": 9.0, "top_k": 3, "min_p": 0.1},
    ],
)
def test_the_options_alone_decide_what_is_generated(loaded, own, temperature):
    model, tokenizer = loaded
    sampling = Sampling(max_new_tokens=12, temperature=temperature)

    def answers():
        found = [answer for batch in generate(model, tokenizer, PROMPTS, sampling) for answer in batch]
        return found, "".join(stream(model, tokenizer, PROMPTS[0], sampling))

    wanted = answers()
    before = model.generation_config
    model.generation_config = with_own = transformers.GenerationConfig(**(before.to_dict() | own))
    try:
        assert answers() == wanted and model.generation_config is with_own
    finally:
        model.generation_config = before


def test_greedy_is_the_likeliest_token(loaded):
    model, tokenizer = loaded
    ((answer,),) = generate(model, tokenizer, PROMPTS[:1], Sampling(max_new_tokens=5))
    ids = tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    for _ in range(answer.tokens):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert answer.text == tokenizer.decode(ids[0, -answer.tokens :], skip_special_tokens=True)
