"""The command: train, compare, estimate, profile, eval, generate, merge, explain, doctor, bench.

Progress and what is about to be done go to standard error, results to standard output; with --json that is
one object and nothing else. Exit code 0: done; 1: failed, with one line on standard error (the traceback only
under --debug); 2: wrong usage. What takes long to import is imported by the command that needs it.
"""

import contextlib
import dataclasses
import importlib
import os
import signal
import sys
import time
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

import peft_engine
from peft_engine.train.compare_command import compare
from peft_engine.train.console import check_base, choice, command, next_command, quiet, say, table, usage
from peft_engine.train.estimate_command import estimate, probe
from peft_engine.train.merge_command import merge
from peft_engine.train.options import (
    Adapters,
    Count,
    Data,
    Debug,
    Dtype,
    Json,
    MaxLength,
    Model,
    Quantize,
    path_option,
)
from peft_engine.train.profile_command import profile
from peft_engine.train.train_command import train

app = typer.Typer(
    name="peft-engine",
    help="LoRA, QLoRA, prefix, prompt and bottleneck adapters, kernel-optimised: train, compare, use them.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def main() -> NoReturn:
    """The entry point of the command."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # oneDNN keeps a thousand products, one for each number of rows it has met: batches of many lengths cost a
    # SmolLM2 in bf16 some 3 MiB a step. With 16 of them steps take as long (160 MiB less after 60).
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")
    # torch's own layer over it keeps a thousand besides, which hold those (prefix tuning in batches of 8:
    # 931 MiB after 60 steps, and 1,034 and rising without this).
    os.environ.setdefault("LRU_CACHE_CAPACITY", "16")
    # As by Ctrl-C: what a command has started ends with it.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.argv[1:] = [_at_home(word) for word in sys.argv[1:]]
    app()
    sys.exit(0)


def _at_home(word: str) -> str:
    """--model=~/x as a shell reads --model ~/x: behind the sign it leaves the tilde as it is."""
    option, equals, value = word.partition("=")
    is_path = option.startswith("--") and equals and (value == "~" or value.startswith("~/"))
    return f"{option}={Path(value).expanduser()}" if is_path else word


app.command()(train)
app.command()(compare)
app.command()(estimate)


def _load(model: str, adapters: list[Path], quantize: str | None, dtype: str | None) -> tuple[Any, list[str]]:
    """The fused model and the adapters' names; says what it does."""
    from peft_engine.train import models

    loaded, names = models.load(model, adapters, quantize, dtype)
    report = peft_engine.optimize(loaded)
    why = "" if report.fused_count == report.total else " (peft-engine explain says which and why)"
    say(f"Layers: {report.fused_count} of {report.total} fused{why}")
    return loaded, names


@app.command(name="eval")
def evaluate(
    model: Model,
    data: Data,
    adapter: Adapters = None,
    quantize: Quantize = None,
    dtype: Dtype = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="Default: classify when there are at most 50 distinct completions, and twice as many rows.",
            metavar="classify|generate",
        ),
    ] = None,
    batch_size: Count = 16,
    max_length: MaxLength = None,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Measure a model, with or without an adapter, on held-out rows.

    With a few completions that come again: accuracy, by the log-probability of each, and a confusion table.
    Otherwise exact match, token F1 and perplexity. Several adapters are measured one after another; the JSON
    then holds "results".

    \b
    Example:
      peft-engine eval --model ./SmolLM2-135M --adapter out/movies --data test.jsonl --json
    """
    with command(debug) as show:
        check_base(quantize, dtype)
        choice("--task", task, ("classify", "generate"))
        from peft_engine.train import progress
        from peft_engine.train.data import length_limit, read_rows

        rows = read_rows(data)
        quiet()
        from peft_engine.train import evaluate as measures
        from peft_engine.train import models

        folders = adapter or []
        config, tokenizer = models.load_config(model), models.load_tokenizer(model)
        limit = length_limit(config, max_length, models.virtual_tokens_of(folders))
        # What is wrong with the rows is told before the model is read.
        measure = measures.prepare(
            config, tokenizer, rows, task=task, limit=limit, split_text=max_length is not None
        )
        loaded, names = _load(model, folders, quantize, dtype)
        results = []
        for name in names if names else (None,):
            peft_engine.active(loaded, name)
            say(f"Evaluating {len(rows)} rows of {data}: {task or measures.task_of(rows)}")
            with progress.bar("Evaluating", len(rows)) as bar:
                results.append(measure(loaded, batch_size, bar.update))
        if json_:
            show(
                results[0]
                if len(results) == 1
                else {"results": [{"adapter": f, **r} for f, r in zip(folders, results, strict=True)]}
            )
        else:
            for i, found in enumerate(results):
                show(table(found, str(folders[i]) if folders else "no adapter"))
        if folders:
            next_command("generate", "--model", model, "--adapter", folders[0], "--prompt", "...")
        else:
            next_command("train", "--model", model, "--data", "train.jsonl", "--output", "out/adapter")


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str | None, typer.Option(help="The text to go on from.")] = None,
    prompt_file: Annotated[
        Path | None,
        path_option("JSONL or CSV with a prompt column, or a text file, one prompt a line."),
    ] = None,
    adapter: Adapters = None,
    quantize: Quantize = None,
    dtype: Dtype = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put each prompt into the tokenizer's chat template.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option()] = 128,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.")] = 0.0,
    top_p: Annotated[
        float, typer.Option(help="Draw from the likeliest tokens that make up this mass.")
    ] = 1.0,
    seed: Annotated[int, typer.Option()] = 0,
    batch_size: Count = 8,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Write text.

    One prompt is streamed; several are run in batches; of several adapters each answers every prompt. Where
    the rows of --prompt-file have an adapter column, each row is answered by the adapter it names (a folder
    of --adapter, or its last part; empty: the base), and rows of different adapters run in one batch.

    \b
    Example:
      peft-engine generate --model ./SmolLM2-135M --adapter out/movies --prompt "Review: fun! Sentiment:"
      peft-engine generate --model ./SmolLM2-135M --adapter out/movies --adapter out/prefix \\
        --prompt-file rows.jsonl
      with rows as {"prompt": "Review: fun! Sentiment:", "adapter": "movies"}
    """
    with command(debug) as show:
        check_base(quantize, dtype)
        if (prompt is None) == (prompt_file is None):
            raise typer.BadParameter("give --prompt or --prompt-file, one of them")
        quiet()
        from peft_engine.train import generate as text
        from peft_engine.train import models
        from peft_engine.train.data import Prompts, check_text

        with usage():
            sampling = text.Sampling(max_new_tokens, temperature, top_p, seed)
        folders = adapter or []
        check_text("--prompt", "the text", prompt or "")
        prompts = text.prompts_from(prompt_file) if prompt_file else Prompts([prompt or ""], None, [""])
        mixed = prompts.adapters is not None
        with usage():
            of_row: list[Path | None] = text.adapters_of(prompts, folders) if mixed else []
        config, tokenizer = models.load_config(model), models.load_tokenizer(model)
        texts = [text.chat_prompt(tokenizer, p) for p in prompts.texts] if chat else prompts.texts
        taken = models.virtual_tokens_of(folders)
        # What is wrong with the prompts is told before the model is read.
        text.encoded(config, tokenizer, texts, max_new_tokens, prompts.where, taken)
        loaded, names = _load(model, folders, quantize, dtype)
        name_of: dict[Path | None, str | None] = {None: None, **dict(zip(folders, names, strict=True))}
        if not mixed and len(names) > 1:  # each adapter answers every prompt
            texts, of_row = [t for t in texts for _ in folders], [*folders] * len(texts)
        test = next(filter(None, map(models.evaluated_on, folders)), None)
        following = ["eval" if test else "explain", "--model", model]
        following += [word for folder in folders for word in ("--adapter", str(folder))]
        given = {"--quantize": quantize, "--dtype": dtype, "--data": test}
        following += [word for option, value in given.items() if value for word in (option, value)]
        where = [place for place in prompts.where for _ in range(len(texts) // len(prompts.where))]
        if not of_row and len(texts) == 1 and not json_:
            with contextlib.closing(text.stream(loaded, tokenizer, texts[0], sampling, where)) as pieces:
                for piece in pieces:
                    show(piece, end="")
            show("")
            next_command(*following)
            return
        many = [name_of[folder] for folder in of_row] or None
        answers: list[dict[str, Any]] = []
        start = time.perf_counter()
        for batch in text.generate(
            loaded, tokenizer, texts, sampling, adapters=many, batch_size=batch_size, where=where
        ):
            for answer in batch:
                folder = of_row[len(answers)] if many else next(iter(folders), None)
                answers.append({**dataclasses.asdict(answer), "adapter": folder})
                if not json_:
                    show(f"--- {answer.prompt}" + (f" [{folder or 'the base'}]" if many else ""))
                    show(answer.text)
        seconds = time.perf_counter() - start
        tokens = sum(answer["tokens"] for answer in answers)
        if json_:
            show(
                {
                    "results": answers,
                    "tokens": tokens,
                    "seconds": seconds,
                    "tokens_per_second": tokens / seconds,
                }
            )
        say(f"{tokens} tokens in {seconds:.1f} s ({tokens / seconds:.1f} tokens/s)")
        next_command(*following)


app.command()(merge)
app.command()(profile)
app.command(hidden=True)(probe)


@app.command()
def explain(
    model: Model,
    adapter: Adapters = None,
    quantize: Quantize = None,
    dtype: Dtype = None,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Say which layers run on a fast path, and why the others do not.

    \b
    Example:
      peft-engine explain --model ./SmolLM2-135M --quantize nf4
    """
    with command(debug) as show:
        check_base(quantize, dtype)
        quiet()
        loaded, _ = _load(model, adapter or [], quantize, dtype)
        report = peft_engine.explain(loaded)
        show(report.to_dict() if json_ else str(report))
        say("Next: peft-engine doctor says what this machine lacks, where a backend is missing")


@app.command()
def doctor(json_: Json = False, debug: Debug = False) -> None:
    """List the backends, versions, CPU and GPU, and how to mend what is missing.

    \b
    Example:
      peft-engine doctor
    """
    with command(debug) as show:
        from peft_engine.doctor import diagnose

        found = diagnose()
        show(found if json_ else _listed(found))
        say("Next: " + ("mend the above" if found["problems"] else "peft-engine train --help"))


def _listed(found: dict[str, Any]) -> str:
    """What `doctor` found, for people."""
    lines = [
        f"backend {k:<10} {'on' if why is None else f'off: {why}'}" for k, why in found["backends"].items()
    ]
    lines += [f"{name:<18} {version or 'not installed'}" for name, version in found["versions"].items()]
    cpu = (f"{k} {' '.join(v) if isinstance(v, list | tuple) else v}" for k, v in found["cpu"].items())
    lines += ["cpu                " + ", ".join(cpu), f"gpu                {found['gpu'] or 'none'}"]
    for name, tool in found["toolchain"].items():
        lines.append(f"{name:<18} " + (tool["problem"] or f"{tool['version']} ({tool['path']})"))
    for problem in found["problems"]:
        lines.append(f"problem: {problem['problem']}\n  mend it: {problem['fix']}")
    return "\n".join(lines)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
)
def bench(context: typer.Context) -> None:
    """Run the benchmarks of a checkout (bench/); what follows goes to its runner.

    \b
    Example:
      peft-engine bench --help
    """
    debug = "--debug" in context.args
    with command(debug):
        checkout = Path(peft_engine.__file__).parents[1]
        if not (checkout / "bench" / "runner.py").is_file():
            raise FileNotFoundError(
                f"bench: no bench/runner.py beside the package ({checkout}); it is part of a checkout of the "
                "repository, not of the wheel: clone it, and pip install --no-build-isolation -e ."
            )
        sys.path.insert(0, str(checkout))
        runner = importlib.import_module("bench.runner")
    code = runner.main([argument for argument in context.args if argument != "--debug"])
    raise typer.Exit(code or 0)
