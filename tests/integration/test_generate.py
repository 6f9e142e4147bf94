"""Text from a model: what decides the next token, what is refused before it, and how it ends."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import transformers
from texts import reviews, tiny_model_folder

import peft_engine
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


# --- how it ends --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("folder"))


@pytest.mark.parametrize("how", ["interrupt", "closed pipe"])
def test_a_stream_that_is_ended_leaves_no_thread_in_torch(folder, how):
    """A daemon thread inside torch's C++ ends the interpreter with an abort."""
    script = (
        "import sys, torch, transformers\n"
        "from peft_engine.cli import main\n"
        "layer = transformers.models.llama.modeling_llama.LlamaDecoderLayer\n"
        "forward, x = layer.forward, torch.randn(1500, 1500)\n"
        "layer.forward = lambda *of, **more: (x @ x, x @ x, forward(*of, **more))[2]\n"
        "sys.argv[0] = 'peft-engine'\n"
        "main()"
    )
    line = ["generate", f"--model={folder}", "--prompt=a fine", "--max-new-tokens=100"]
    path = os.pathsep.join([str(Path(peft_engine.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    with subprocess.Popen(
        [sys.executable, "-c", script, *line],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path},
    ) as process:  # fmt: skip
        assert os.read(process.stdout.fileno(), 1)
        if how == "interrupt":
            process.send_signal(signal.SIGINT)
        else:
            process.stdout.close()
        err = process.stderr.read().decode()
    assert process.returncode == 1, err
    last = "peft-engine: interrupted" if how == "interrupt" else "Layers: "
    assert err.splitlines()[-1].startswith(last) and "Traceback" not in err


def test_an_error_of_the_model_is_raised_where_the_stream_is_read(loaded, monkeypatch):
    model, tokenizer = loaded
    before = threading.enumerate()

    def fails(*of, **more):
        raise RuntimeError("no more")

    monkeypatch.setattr(model.model, "forward", fails)
    with pytest.raises(RuntimeError, match="no more"):
        list(stream(model, tokenizer, PROMPTS[0], Sampling(max_new_tokens=3)))
    monkeypatch.undo()
    with contextlib.closing(stream(model, tokenizer, PROMPTS[0], Sampling(max_new_tokens=100))) as pieces:
        next(pieces)
    assert threading.enumerate() == before
