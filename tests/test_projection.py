"""AlphaEdit's null_space_project.pt: what its own code computes from the same C."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from artifact_kit import second_moments, write_cov
from cli_kit import kscli, one_sentence
from numpy.typing import NDArray

from kscli.artifacts import CovarianceFile
from kscli.editing.metrics import Cut, null_space


def by_svd(C: NDArray[np.float32], threshold: float) -> NDArray[np.float32]:
    """Pi as AlphaEdit has it: the left singular vectors whose singular value is small."""
    U, S, _ = torch.linalg.svd(torch.from_numpy(C), full_matrices=False)
    small = U[:, threshold > S]
    return (small @ small.T).numpy()  # type: ignore[no-any-return]


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("editor", ["alphaedit", "easyedit"])
def test_the_file_is_what_alphaedit_computes(tmp_path: Path, editor: str, relative: bool) -> None:
    cov = write_cov(tmp_path / "cov.h5")
    option = "--relative-null-space" if relative else "--null-space"
    how = ("export-cov", "--cov", cov, "--for", editor, "--projection", option, "0.98")
    done = kscli(*how, "--layers", "0,2", "-o", tmp_path)
    assert done.exit_code == 0, done.stderr
    assert "layers 0, 2, in this order" in done.stderr.replace("\n", " ")
    # How AlphaEdit's script and EasyEdit load it: no pickled class is needed.
    P = torch.load(tmp_path / "null_space_project.pt", weights_only=True)
    assert P.dtype == torch.float32
    assert P.shape == (2, 12, 12)
    for index, layer in enumerate((0, 2)):
        C = second_moments()[layer]
        scale = float(np.trace(C)) / 12 if relative else 1.0
        wanted = by_svd(C, 0.98 * scale)
        assert 0 < np.trace(wanted) < 12
        np.testing.assert_allclose(P[index].numpy(), wanted, atol=1e-5)


def test_the_file_is_the_editors_own_null_space(tmp_path: Path) -> None:
    path = write_cov(tmp_path / "cov.h5")
    how = ("export-cov", "--cov", path, "--for", "alphaedit", "--projection", "-o", tmp_path)
    assert kscli(*how, "--layers", "1", "--null-space", "1").exit_code == 0
    P = torch.load(tmp_path / "null_space_project.pt", weights_only=True)[0].numpy()
    with CovarianceFile(path) as cov:
        basis = null_space(cov.second_moment(1), Cut(1.0)).basis
    np.testing.assert_allclose(P, basis @ basis.T, atol=1e-7)


def test_mistakes_are_one_sentence_and_write_nothing(tmp_path: Path) -> None:
    cov = write_cov(tmp_path / "cov.h5")
    folder = tmp_path / "out"
    how = ("export-cov", "--cov", cov, "-o", folder)
    of_layers = ("--for", "alphaedit", "--layers", "0-1", "--projection")
    for arguments, code, said in [
        (("--for", "alphaedit", "--projection"), 2, "--layers 4-8"),
        (("--for", "rome", "--projection", "--layers", "0"), 2, "not of rome"),
        ((*of_layers, "--as", "x"), 2, "--as has no effect with --projection"),
        (("--for", "alphaedit", "--null-space", "1"), 2, "without --projection"),
        (
            (*of_layers, "--null-space", "1", "--relative-null-space", "1"),
            2,
            "two cuts; give one",
        ),
        (of_layers, 1, "layer 0 of"),
        ((*of_layers, "--null-space", "9"), 1, "everything"),
        (("--for", "alphaedit", "--layers", "7", "--projection"), 2, "no layer 7"),
    ]:
        refused = kscli(*how, *arguments)
        assert refused.exit_code == code, (arguments, refused.stderr)
        assert said in one_sentence(refused.stderr)
        assert not folder.exists()
    assert kscli(*how, *of_layers, "--null-space", "1").exit_code == 0
    before = (folder / "null_space_project.pt").read_bytes()
    assert "--force" in one_sentence(kscli(*how, *of_layers, "--null-space", "0.98").stderr)
    assert (folder / "null_space_project.pt").read_bytes() == before
    assert kscli(*how, *of_layers, "--null-space", "0.98", "--force").exit_code == 0
    assert (folder / "null_space_project.pt").read_bytes() != before
