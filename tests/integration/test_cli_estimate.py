"""`peft-engine estimate`: what it predicts is what train measures; and what is said when memory runs out."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import safetensors
import torch
import transformers
from texts import reviews, tiny_encoder_decoder_folder, write_jsonl

from peft_engine.train import estimate, memory
from peft_engine.train.data import Document
from peft_engine.train.estimate_command import table
from peft_engine.train.models import load_base, load_config
from peft_engine.train.run import prepare
from peft_engine.train.settings import LoopSettings, RunSettings

ROOT = Path(__file__).parents[2]
SMOLLM2, MOVIES = ROOT / ".cache" / "smollm2", ROOT / ".cache" / "movies" / "train.jsonl"
MIB = 2**20


@pytest.fixture
def data(tmp_path) -> Path:
    return write_jsonl(tmp_path / "rows.jsonl", reviews(4))


def settings(model, data="rows.jsonl", **changes) -> RunSettings:
    loop = {name: changes.pop(name) for name in list(changes) if name in LoopSettings.__dataclass_fields__}
    return RunSettings(
        model=str(model), data=Path(data), output=Path("unused"), loop=LoopSettings(**loop), **changes
    )


@pytest.mark.skipif(
    not MOVIES.exists(), reason="no .cache/smollm2 and .cache/movies: `make demo` fetches them"
)
def test_the_total_is_within_a_tenth_of_what_train_measures(command, tmp_path):
    options = ["--model", SMOLLM2, "--data", MOVIES, "--batch-size", 8, "--max-steps", 2]  # qlora
    line = [sys.executable, "-m", "peft_engine", "train", *options, "--output", tmp_path / "out", "--json"]
    with subprocess.Popen([*map(str, line)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as train:
        code, out, err = command("estimate", *options, "--no-levers", "--json")
        record = json.loads(train.communicate()[0])
    assert code == 0, err
    found = json.loads(out)
    assert abs(found["total"] / record["peak_rss_bytes"] - 1) < 0.1
    assert found["kinds"]["adapter"] == 4 * record["trainable_parameters"]
    assert sum(found["kinds"].values()) == found["training"] <= found["total"]
    assert found["batch"]["rows"] == 8 and found["batch"]["packed"] is True


@pytest.mark.parametrize("method", ["lora", "qlora", "bottleneck"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_stays_is_counted_to_the_byte(model, method, dtype):
    run = settings(model, method=method, dtype=dtype)
    config = load_config(run.model)
    counted = memory.exact(run, config)
    assert memory.stored_dtype(run.model, config) == torch.float32  # still, whatever the run's is
    made, _ = prepare(run, None)
    trained = [p for p in made.parameters() if p.requires_grad]
    frozen = {id(t): t.nbytes for t in [*made.parameters(), *made.buffers()] if not t.requires_grad}
    assert sum(counted.weights.values()) == sum(frozen.values())
    assert sum(counted.adapter.values()) == sum(p.nbytes for p in trained)
    assert sum(counted.layers) == counted.weights["layers"] and len(set(counted.layers)) == 1
    assert counted.weights["embedding"] == made.get_input_embeddings().weight.nbytes


def test_a_config_alone_is_enough_and_the_largest_lever_comes_first(command, model, tmp_path):
    load_config(str(model)).save_pretrained(tmp_path / "config alone")
    options = ["--model", tmp_path / "config alone", "--tokens", 120, "--batch-size", 8]
    code, out, err = command("estimate", *options, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["batch"]["tokens"] == 960 and found["layers"] == 2 and found["share"] == 1.0
    saves = {lever["option"]: lever["saves"] for lever in found["levers"]}
    assert list(saves.values()) == sorted(saves.values(), reverse=True)
    half = saves["--batch-size 4 --gradient-accumulation-steps 2"]
    assert 0.8 < saves["--tokens 60"] / half < 1.25  # both run half of the tokens
    layer = found["parts"]["a layer"]  # both layers were run at once: what they keep is not told apart
    assert layer["adapter"] * 2 == found["kinds"]["adapter"] and layer["activations"] is None
    kept, passing = found["kinds"]["activations"], found["kinds"]["workspace"]
    assert 0.4 * kept < half < 0.6 * (kept + passing) and saves["--gradient-checkpointing"] > 0
    shown = table(found)
    for text in (
        "Largest micro-batch: 8 rows, 960 tokens, packed",
        "workspace",
        "a layer, of 2",
        "It fits: ",
    ):
        assert text in shown
    assert shown.splitlines()[-len(saves)].split()[0] == f"{next(iter(saves.values())) / MIB:,.1f}"
    assert "Next: peft-engine train '--model=" in err and "--batch-size" not in err.splitlines()[-1]
    assert "2 of 2 layers" in err


@pytest.mark.parametrize("arguments", [(), ("--data", "rows.jsonl", "--tokens", 5)])
def test_rows_or_their_length_must_be_given(command, model, arguments):
    code, out, err = command("estimate", "--model", model, *arguments)
    assert code == 2 and out == "" and "--tokens" in err


@pytest.mark.parametrize(
    ("more", "limit"), [((), 128), (("--method", "prefix"), 112), (("--max-length", 9), 9)]
)
def test_rows_that_train_would_refuse_are_not_estimated(command, model, more, limit):
    code, out, err = command("estimate", "--model", model, "--tokens", limit + 1, *more)
    assert code == 1 and out == "" and f"--tokens: {limit + 1} in a row, at most {limit} are allowed" in err


@pytest.mark.parametrize("at", ["config", "weights"])
def test_a_full_disk_is_told_with_the_variable_that_chooses_another(
    command, model, tmp_path, monkeypatch, at
):
    def full(*of, **more):
        if at == "config":
            raise OSError(28, "No space left on device")
        raise safetensors.SafetensorError("Error: I/O error: No space left on device (os error 28)")

    where = "safetensors.torch.save_file" if at == "weights" else "transformers.LlamaConfig.save_pretrained"
    monkeypatch.setattr(where, full)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code, out, err = command("estimate", "--model", model, "--tokens", 8)
    assert code == 1 and out == "" and not list(tmp_path.iterdir())
    assert f"estimate: {tmp_path} has no space for the small models that are measured; set TMPDIR" in err


def test_what_a_probe_leaves_is_in_the_folder_that_goes(command, model, monkeypatch):
    seen = []
    monkeypatch.setattr(
        estimate, "run_command", lambda line, label, say, folder: seen.append(folder) or 1 / 0
    )
    assert command("estimate", "--model", model, "--tokens", 8)[0] == 1
    assert "peft-engine-estimate-" in seen[0].name and not seen[0].exists()


def test_the_line_of_the_depths_goes_to_the_whole_model():
    assert estimate.at((4, 12), (100, 180), 30) == 360
    assert estimate.at((4, 12), (100, 180), 1, slope=True) == 10
    assert estimate.at((2,), (100,), 2) == 100


def test_layers_that_take_turns_are_run_in_whole_turns(model):
    config = load_config(str(model))
    config.layer_types = (["sliding_attention"] * 5 + ["full_attention"]) * 20
    same = memory.Exact([7] * 120, {}, None)
    assert estimate.depths_of(same, config) == (24, 72)
    assert estimate.shortened(config, 2).layer_types is not config.layer_types
    with pytest.raises(estimate.EstimateError, match="differ, and do not come again"):
        estimate.depths_of(memory.Exact([1, *[7] * 119], {}, None), config)
    config.layer_types = None
    assert estimate.depths_of(memory.Exact([100 * MIB] * 32, {}, None), config) == (1, 2)


def test_the_small_models_load_as_any_other(model, tmp_path):
    config = load_config(str(model))
    estimate.write_small(config, (1, 2), torch.float32, tmp_path)
    for depth in (1, 2):
        small = load_base(str(tmp_path / str(depth)), quantize="none")
        assert len(small.model.layers) == depth
        assert all(torch.isfinite(p).all() and p.any() for p in small.parameters())
        assert small.lm_head.weight.shape == (config.vocab_size, config.hidden_size)


def test_an_encoder_with_a_decoder_is_estimated_by_its_data(command, tmp_path):
    folder = tiny_encoder_decoder_folder("t5", tmp_path / "t5")
    code, out, err = command("estimate", "--model", folder, "--tokens", 8)
    assert code == 1 and out == "" and "tokens on two sides; give --data" in err
    data = write_jsonl(tmp_path / "rows.jsonl", reviews())
    run = settings(folder, data, method="lora", learning_rate=1e-3)
    found = estimate.estimate(run, None, lambda line: None, levers=False)
    assert found["layers"] == 2 and found["batch"]["rows"] == 8
    assert not found["batch"]["packed"]
    made = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder)
    assert found["kinds"]["weights"] == sum(p.nbytes for p in made.parameters())
    code, out, err = command(
        "train", "--model", folder, "--data", data, "--method", "lora", "--max-steps", 1, "--output",
        tmp_path / "out",
    )  # fmt: skip
    assert code == 0, err
    adapter = safetensors.torch.load_file(tmp_path / "out/adapter_model.safetensors")
    assert found["kinds"]["adapter"] == sum(4 * t.numel() for t in adapter.values())


def test_depths_that_differ_are_told(command, tmp_path):
    transformers.T5Config(num_layers=2, num_decoder_layers=3).save_pretrained(tmp_path)
    data = write_jsonl(tmp_path / "rows.jsonl", reviews())
    code, out, err = command("estimate", "--model", tmp_path, "--data", data)
    assert code == 1 and out == "" and "2 layers in its encoder and 3 in its decoder" in err


def test_the_micro_batches_are_those_that_train_takes(model, tmp_path, monkeypatch):
    from peft_engine.train import trainer

    run = settings(model, method="lora", batch_size=3, epochs=2.0, learning_rate=1e-3)
    made, _ = prepare(run, None)
    documents = [Document(list(range(2, n + 4)), list(range(2, n + 4))) for n in range(17)]
    lengths = [
        [len(documents[i].input_ids) for i in rows] for rows in trainer.order(made, documents, run.loop)
    ]
    seen = []
    step = trainer._AdapterTrainer.training_step

    def watched(self, model, inputs, count=None):
        seen.append(inputs["input_ids"].numel())
        return step(self, model, inputs, count)

    monkeypatch.setattr(trainer._AdapterTrainer, "training_step", watched)
    trainer.train(made, documents, tmp_path, run.loop, say=lambda line: None)
    assert len(seen) == 12 and seen == [sum(rows) for rows in lengths]


# --- what is free -------------------------------------------------------------------------------------------


def test_a_limit_of_the_process_is_what_is_free():
    script = (
        "import resource, peft_engine.train.memory as m, torch\n"
        "held = m._fields(m.Path('/proc/self/status'))['VmData']\n"
        "resource.setrlimit(resource.RLIMIT_DATA, (held + (64 << 20), resource.RLIM_INFINITY))\n"
        "print(*m.free_bytes())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    size, _, who = done.stdout.strip().partition(" ")
    assert 0 < int(size) <= 64 * MIB and who == "ulimit leaves"


def test_a_run_that_cannot_fit_says_so_before_it_loads(command, model, data, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda: (10_000, "the system has free"))
    line = ["train", "--model", model, "--data", data, "--output", tmp_path / "out", "--max-steps", 1]
    code, _, err = command(*line)
    assert code == 0, err
    told = err.index("Memory: this cannot fit: weights, adapter and optimiser alone take")
    assert told < err.index("Layers: ") and "the system has free 0 MiB" in err
    monkeypatch.setattr(memory, "free_bytes", lambda: (1 << 40, "the system has free"))
    code, _, err = command(*line, "--overwrite")
    assert code == 0 and "Memory:" not in err


def test_a_training_without_memory_tells_the_command_that_tells_why(model, tmp_path):
    rows = [{"prompt": "fine " * 20, "completion": " positive"}] * 600
    data = write_jsonl(tmp_path / "my rows.jsonl", rows)
    script = (
        "import resource, sys\n"
        "from peft_engine.train import memory, run, trainer\n"
        "import peft_engine.cli as cli\n"
        "def limit(*of):\n"
        "    held = memory._fields(memory.Path('/proc/self/status'))['VmData']\n"
        "    resource.setrlimit(resource.RLIMIT_DATA, (held + (48 << 20), resource.RLIM_INFINITY))\n"
        "    return made(*of)\n"
        "made, run.prepare = run.prepare, limit\n"
        "sys.argv = ['peft-engine', *sys.argv[1:]]\n"
        "cli.main()"
    )
    options = ["--model", model, "--data", data, "--method", "lora", "--batch-size", 600]
    line = [sys.executable, "-c", script, "train", *options, "--output", tmp_path / "out"]
    done = subprocess.run([*map(str, line)], capture_output=True, text=True)
    assert done.returncode == 1
    *_, error, hint = done.stderr.strip().splitlines()
    assert (
        error.startswith("peft-engine: error: train: out of memory at step 1") and "--batch-size 300" in error
    )
    assert hint.endswith(
        f"peft-engine estimate --model={model} '--data={data}' --method=lora --batch-size=600"
    )
