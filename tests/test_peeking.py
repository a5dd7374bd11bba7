from __future__ import annotations

import json
import shutil
from pathlib import Path

import h5py
import pytest
from cli_kit import kscli, kscli_process
from transformers import AutoTokenizer

from kscli.tiny import MODEL_DIR

TEXTS = ["The river.", "", "A \x1b[31mred\n city and a   sea. " * 40, "ä" * 10, *["Land."] * 20]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"body": {"en": text}}) + "\n" for text in TEXTS))
    return path


def test_ten_documents_with_the_tokens_that_cache_cov_takes(texts: Path, tmp_path: Path) -> None:
    asked = ("--text-field", "body.en", "--max-length", "64")
    result = kscli("corpus", "peek", texts, *asked, "-f", "json")
    rows = json.loads(result.stdout)
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    lengths = [len(tokenizer(text)["input_ids"]) for text in TEXTS[:10]]
    assert [row["tokens"] for row in rows] == [min(length, 64) for length in lengths]
    assert [row["cut"] for row in rows] == [length > 64 for length in lengths]
    assert [row["characters"] for row in rows] == list(map(len, TEXTS[:10]))
    assert rows[2]["begin"].startswith("A \x1b[31mred city and a sea. A")
    total = sum(row["tokens"] for row in rows)
    assert " ".join(result.stderr.split()) == (
        f"documents: 10, with {total:,} tokens of tiny; cut at 64 tokens: 1; without a token: 1."
    )
    out = tmp_path / "cov.h5"
    measured = ("--corpus", texts, "--samples", "10", "--layers", "0", "-o", out)
    assert kscli("cache-cov", *measured, *asked).exit_code == 0
    with h5py.File(out) as file:
        assert file["count"][()] == total


def test_the_table_and_samples(texts: Path) -> None:
    result = kscli("corpus", "peek", "--corpus", texts, "--text-field", "body.en", "--samples", "3")
    assert result.exit_code == 0
    assert "\x1b" not in result.stdout
    assert [line.split()[0] for line in result.stdout.splitlines()[2:] if line] == ["1", "2", "3"]
    every = kscli("corpus", "peek", texts, "--text-field", "body.en", "--samples", "all")
    assert f"documents: {len(TEXTS)}," in every.stderr


def test_two_corpora_are_refused(texts: Path) -> None:
    result = kscli("corpus", "peek", texts, "--corpus", "tiny")
    assert result.exit_code == 2
    assert "name two corpora" in str(result.stderr)


def test_the_weights_are_not_read(texts: Path, tmp_path: Path) -> None:
    """A model of which only the tokenizer and the configuration are there will do."""
    shutil.copytree(MODEL_DIR, tmp_path / "model")
    for weights in (tmp_path / "model").glob("*.safetensors"):
        weights.unlink()
    named = ("-m", tmp_path / "model", "--text-field", "body.en", "-f", "json")
    result = kscli("corpus", "peek", texts, *named)
    assert result.exit_code == 0, result.stderr
    embedded = kscli("corpus", "peek", texts, "--text-field", "body.en", "-f", "json")
    assert result.stdout == embedded.stdout


def test_the_default_model_and_a_mistyped_one(texts: Path, tmp_path: Path) -> None:
    """Beside the artifacts of other models, with no folder of artifacts to speak of."""
    (tmp_path / "artifacts" / "other").mkdir(parents=True)
    (tmp_path / "artifacts" / "other" / "cov.h5").touch()
    asked = ("corpus", "peek", texts, "--text-field", "body.en")
    found = kscli_process(*asked, cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    mistyped = kscli_process(*asked, "-m", "gpt2-smal", cwd=tmp_path)
    assert mistyped.returncode == 2
    assert "did you mean gpt2-small?" in mistyped.stderr
