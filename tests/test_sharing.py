"""push and pull, by the real client against a Hub on loopback."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
from artifact_kit import Contents, write_cov, write_toy
from cli_kit import kscli, one_sentence
from hub_kit import TOKEN, WritableHub, writable_hub
from typer.testing import Result

from kscli.artifacts import Artifact, CovarianceFile

REPOSITORY = "me/covariances"
OTHERS = "someone/else"


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Artifacts of the embedded model as its commands make them."""
    root = tmp_path_factory.mktemp("measured")
    for line in ("cache-cov --tokens 9000", "extract --count 14", "pmatrix"):
        made = kscli(*line.split(), "-m", "tiny", "-q", "--dir", root)
        assert made.exit_code == 0, made.stderr
    return root


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[WritableHub]:
    with writable_hub(monkeypatch, str(tmp_path / "cache")) as running:
        yield running


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    write_toy(tmp_path / "mine")
    return tmp_path / "mine"


def push(root: Path, *more: str, model: str = "toy", repository: str = REPOSITORY) -> Result:
    return kscli("push", repository, "-m", model, "--dir", root, *more)


def pull(root: Path, *more: str, model: str = "toy", repository: str = REPOSITORY) -> Result:
    return kscli("pull", repository, "-m", model, "--dir", root, *more)


def refusal(result: Result) -> str:
    assert result.exit_code == 1
    said = " ".join(one_sentence(result.stderr).split())
    assert TOKEN not in result.stderr
    return said


def test_what_is_pulled_is_what_was_pushed(
    hub: WritableHub, measured: Path, tmp_path: Path
) -> None:
    assert push(measured, model="tiny").exit_code == 0
    files = hub.files(REPOSITORY)
    assert {f"Bearer {TOKEN}"} == hub.tokens
    assert not any(TOKEN.encode() in body for body in files.values())
    pulled = pull(tmp_path, model="tiny")
    assert pulled.exit_code == 0, pulled.stderr
    for kind in ("cov", "keys", "pmatrix"):
        mine, theirs = (root / "tiny" / f"{kind}.h5" for root in (measured, tmp_path))
        with Artifact(mine) as mine_read, Artifact(theirs) as theirs_read:
            assert mine_read.fingerprint == theirs_read.fingerprint
            assert mine_read.stamp == theirs_read.stamp
        with h5py.File(mine) as a, h5py.File(theirs) as b:
            names = [name for name in a if isinstance(a[name], h5py.Dataset) and name != "seal"]
            assert all(np.array_equal(a[name], b[name]) for name in names)
    # Nothing has to be made again.
    again = kscli("pmatrix", "-m", "tiny", "--dir", tmp_path)
    assert "up to date" in again.stderr, again.stderr


def test_single_layers(hub: WritableHub, toy: Path, tmp_path: Path) -> None:
    push(toy)
    pulled = pull(tmp_path, "--only", "cov", "--layers", "1-2")
    assert pulled.exit_code == 0, pulled.stderr
    assert "toy/cov/layer-00000.h5" not in hub.fetched()
    with (
        CovarianceFile(toy / "toy" / "cov.h5") as whole,
        CovarianceFile(tmp_path / "toy" / "cov.h5") as part,
    ):
        assert part.layers == (1, 2)
        assert part.count == whole.count
        for layer in part.layers:
            assert np.array_equal(part.second_moment(layer), whole.second_moment(layer))
        assert part.about.inputs == {f"hf:{REPOSITORY}": whole.fingerprint}
        assert part.about.corpus_identity == whole.about.corpus_identity
    assert not (tmp_path / "toy" / "keys.h5").exists()
    assert "is there already" in pull(tmp_path, "--only", "cov", "--layers", "1-2").stderr
    other = refusal(pull(tmp_path, "--only", "cov", "--layers", "0"))
    assert "cov.h5 exists; add --force" in other
    assert pull(tmp_path, "--only", "cov", "--layers", "0", "--force").exit_code == 0
    with CovarianceFile(tmp_path / "toy" / "cov.h5") as part:
        assert part.layers == (0,)
    absent = pull(tmp_path / "new", "--layers", "7")
    assert absent.exit_code == 2
    assert "has no layer 7; it has 0-2" in " ".join(absent.stderr.split())


def test_a_single_layer_is_an_artifact_of_its_own(
    hub: WritableHub, measured: Path, tmp_path: Path
) -> None:
    push(measured, "--only", "cov", model="tiny")
    path = tmp_path / "layer.h5"
    path.write_bytes(hub.files(REPOSITORY)["tiny/cov/layer-00002.h5"])
    with CovarianceFile(path) as part, CovarianceFile(measured / "tiny" / "cov.h5") as whole:
        assert part.layers == (2,)
        assert part.about.recipe == {**whole.about.recipe, "layers": "2"}
        assert part.settling.keys() == whole.settling.keys() != set()
    assert kscli("show", path).exit_code == 0


def test_the_index_and_the_card_say_what_there_is(hub: WritableHub, toy: Path) -> None:
    push(toy)
    files = hub.files(REPOSITORY)
    holds = json.loads(files["toy/kscli.json"])["holds"]
    assert set(holds) == {"cov", "keys", "pmatrix"}
    for layer, part in holds["cov"]["parts"].items():
        body = files[f"toy/cov/layer-{int(layer):05d}.h5"]
        assert part == {"sha256": hashlib.sha256(body).hexdigest(), "size": len(body)}
    card = files["README.md"].decode()
    assert card.startswith("---\nviewer: false\n")
    for said in ("someone/toy", "toy text", "2,000", "0-2", holds["cov"]["fingerprint"]):
        assert said in card
    assert f"kscli pull {REPOSITORY} -m toy" in card


def test_what_others_wrote_into_the_card_stays(hub: WritableHub, toy: Path) -> None:
    hub.put(REPOSITORY, {"README.md": b"---\nlicense: mit\n---\n# Mine\n\nWords.\n"})
    push(toy, "--only", "keys")
    card = hub.files(REPOSITORY)["README.md"]
    changed = card.replace(b"Words.", b"Other words.") + b"\nAfter.\n"
    hub.put(REPOSITORY, {**hub.files(REPOSITORY), "README.md": changed})
    push(toy)
    card = hub.files(REPOSITORY)["README.md"]
    assert card.startswith(b"---\nlicense: mit\n---\n# Mine\n\nOther words.\n")
    assert card.endswith(b"\nAfter.\n")
    assert card.count(b"written by `kscli push`") == 2
    assert b"cov/layer-" in card


def test_pushing_again_sends_what_is_missing(hub: WritableHub, toy: Path) -> None:
    push(toy, "--only", "cov", "--layers", "0")
    assert "0 of 0-2" in hub.files(REPOSITORY)["README.md"].decode()
    sent = len(hub.objects)
    assert push(toy, "--only", "cov").exit_code == 0
    assert len(hub.objects) == sent + 2
    commits = len(hub.commits[REPOSITORY])
    again = push(toy, "--only", "cov")
    assert "holds all of it already" in again.stderr
    assert len(hub.commits[REPOSITORY]) == commits


def test_another_artifact_is_replaced_by_force_alone(
    hub: WritableHub, toy: Path, tmp_path: Path
) -> None:
    push(toy)
    before = hub.files(REPOSITORY)
    write_cov(toy / "toy" / "cov.h5", seed=5)
    said = refusal(push(toy, "--only", "cov"))
    assert "holds another cov of toy; add --force" in said
    assert hub.files(REPOSITORY) == before
    assert push(toy, "--only", "cov", "--layers", "1", "--force").exit_code == 0
    assert [name for name in hub.files(REPOSITORY) if "/cov/" in name] == ["toy/cov/layer-00001.h5"]
    assert pull(tmp_path, "--only", "cov").exit_code == 0
    with CovarianceFile(tmp_path / "toy" / "cov.h5") as part:
        assert part.about.corpus_identity == "c5"


def test_private_is_asked_for(hub: WritableHub, toy: Path) -> None:
    push(toy)
    push(toy, "--private", repository="me/secret")
    assert hub.private == {REPOSITORY: False, "me/secret": True}


def test_the_only_model_needs_no_name(hub: WritableHub, toy: Path, tmp_path: Path) -> None:
    push(toy)
    found = kscli("pull", REPOSITORY, "--dir", toy)
    assert found.exit_code == 0
    assert "keys.h5 is there already" in found.stderr
    assert "tiny" not in found.stderr  # which other commands take where no model is named
    assert kscli("pull", REPOSITORY, "--dir", tmp_path / "a").exit_code == 0
    assert (tmp_path / "a" / "toy" / "keys.h5").exists()
    shutil.copytree(toy / "toy", toy / "second")
    push(toy, model="second")
    said = refusal(kscli("pull", REPOSITORY, "--dir", tmp_path / "b"))
    assert "name the model" in said
    assert "second, toy" in said


def test_a_model_is_found_by_its_id_on_the_hub(hub: WritableHub, toy: Path, tmp_path: Path) -> None:
    push(toy)
    assert pull(tmp_path, model="someone/toy").exit_code == 0
    assert (tmp_path / "someone--toy" / "cov.h5").exists()
    said = refusal(pull(tmp_path, model="gpt-j"))
    assert "holds nothing of gpt-j; it holds toy" in said


def test_an_earlier_commit(hub: WritableHub, toy: Path, tmp_path: Path) -> None:
    push(toy)
    commit = hub.commits[REPOSITORY][-1][0]
    write_cov(toy / "toy" / "cov.h5", seed=5)
    push(toy, "--force")
    pulled = pull(tmp_path, "--only", "cov", "--revision", commit)
    assert pulled.exit_code == 0, pulled.stderr
    with CovarianceFile(tmp_path / "toy" / "cov.h5") as part:
        assert part.about.corpus_identity == "c0"


# ---------------------------------------------------------------- what is not sound


def reindexed(hub: WritableHub, path: str, body: bytes) -> None:
    """Put another file into the repository, with the SHA-256 of it in the index."""
    files = dict(hub.files(REPOSITORY))
    old, files[path] = files[path], body
    for was, now in ((old, body),):
        sums = [hashlib.sha256(each).hexdigest() for each in (was, now)]
        index = files["toy/kscli.json"].decode().replace(*sums)
        index = index.replace(f'"size": {len(was)}', f'"size": {len(now)}', 1)
        files["toy/kscli.json"] = index.encode()
    hub.put(REPOSITORY, files)


def test_a_file_of_another_hash_is_refused(hub: WritableHub, toy: Path, tmp_path: Path) -> None:
    push(toy)
    files = dict(hub.files(REPOSITORY))
    files["toy/cov/layer-00001.h5"] = files["toy/cov/layer-00000.h5"]
    hub.put(REPOSITORY, files)
    said = refusal(pull(tmp_path / "new"))
    assert "layer-00001.h5" in said
    assert "SHA-256" in said
    assert not (tmp_path / "new").exists()  # nor is any of the sound files put in place


def test_a_changed_file_is_refused_by_its_seal(hub: WritableHub, toy: Path, tmp_path: Path) -> None:
    push(toy)
    body = bytearray(hub.files(REPOSITORY)["toy/keys.h5"])
    with Artifact(toy / "toy" / "keys.h5") as keys:
        offset = keys._file.arrays["keys"].offset
    body[offset] ^= 1
    reindexed(hub, "toy/keys.h5", bytes(body))
    said = refusal(pull(tmp_path / "new"))
    assert "its dataset keys" in said
    assert not (tmp_path / "new").exists()


def test_a_layer_of_another_run_is_refused(hub: WritableHub, toy: Path, tmp_path: Path) -> None:
    write_cov(toy / "other" / "cov.h5", seed=5)
    push(toy)
    push(toy, model="other", repository=OTHERS)
    reindexed(hub, "toy/cov/layer-00001.h5", hub.files(OTHERS)["other/cov/layer-00001.h5"])
    said = refusal(pull(tmp_path / "new", "--only", "cov"))
    assert "layer-00001.h5 differ in recipe: they are not of one run" in said
    assert not (tmp_path / "new").exists()


def test_another_fingerprint_than_the_index_says(
    hub: WritableHub, toy: Path, tmp_path: Path
) -> None:
    push(toy)
    with CovarianceFile(toy / "toy" / "cov.h5") as cov:
        fingerprint = cov.fingerprint
    files = dict(hub.files(REPOSITORY))
    index = files["toy/kscli.json"].replace(fingerprint.encode(), b"0" * 32)
    hub.put(REPOSITORY, {**files, "toy/kscli.json": index})
    assert "has the fingerprint" in refusal(pull(tmp_path / "new", "--only", "cov"))
    assert not (tmp_path / "new").exists()


def test_files_of_another_model_are_refused(hub: WritableHub, toy: Path, tmp_path: Path) -> None:
    push(toy)
    files = {name.replace("toy/", "gpt-j/"): body for name, body in hub.files(REPOSITORY).items()}
    hub.put(REPOSITORY, files)
    said = refusal(pull(tmp_path / "new", model="gpt-j"))
    assert "is of someone/toy, and gpt-j is EleutherAI/gpt-j-6b" in said
    assert not (tmp_path / "new").exists()


def test_files_that_do_not_go_with_what_is_there(
    hub: WritableHub, toy: Path, tmp_path: Path
) -> None:
    push(toy)
    write_cov(tmp_path / "new" / "toy" / "cov.h5", weights="sha256:other")
    said = refusal(pull(tmp_path / "new", "--only", "keys"))
    assert "differ in weights (sha256:w and sha256:other)" in said
    assert not (tmp_path / "new" / "toy" / "keys.h5").exists()


@pytest.mark.parametrize(
    "index",
    [
        b"",
        b"[]",
        b"\xff",
        b'{"format": 1, "holds": {"cov": {}}}',
        b'{"format": 1, "holds": {"cov": {"fingerprint": "a", "layers": "0", "spelled": "all", '
        b'"parts": {"../../x": {"sha256": "' + b"0" * 64 + b'", "size": 1}}, "said": {}}}}',
    ],
)
def test_an_index_that_is_none(hub: WritableHub, toy: Path, tmp_path: Path, index: bytes) -> None:
    push(toy)
    hub.put(REPOSITORY, {**hub.files(REPOSITORY), "toy/kscli.json": index})
    assert "toy/kscli.json of me/covariances" in refusal(pull(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_a_file_that_was_changed_is_not_pushed(hub: WritableHub, toy: Path) -> None:
    contents = Contents(toy / "toy" / "keys.h5")
    contents["keys"][0, 0, 0] = np.nan
    data = bytearray((toy / "toy" / "cov.h5").read_bytes())
    with CovarianceFile(toy / "toy" / "cov.h5") as cov:
        data[cov._file.arrays["second_moment"].offset + 3] ^= 1
    (toy / "toy" / "cov.h5").write_bytes(data)
    assert "its dataset second_moment" in refusal(push(toy))
    assert hub.commits == {}


# ---------------------------------------------------------------- what the Hub refuses


@pytest.mark.parametrize(
    ("status", "said"), [(401, "rejects your token"), (403, "Use a token that may.")]
)
def test_a_token_that_may_not_write(hub: WritableHub, toy: Path, status: int, said: str) -> None:
    hub.put(REPOSITORY, {})
    hub.denied = status
    assert said in refusal(push(toy))


def test_no_token(hub: WritableHub, toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kscli.hub.repository.get_token", lambda: None)
    assert "hf auth login" in refusal(push(toy))
    assert hub.requests == []


def test_a_commit_of_someone_else_meanwhile(
    hub: WritableHub, toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.put(REPOSITORY, {"x": b"1"})
    from kscli.hub import sharing

    written = sharing.write_index

    def meanwhile(held: dict[str, sharing.Holding]) -> str:
        hub.put(REPOSITORY, {"x": b"2"})
        return written(held)

    monkeypatch.setattr(sharing, "write_index", meanwhile)
    assert "changed meanwhile" in refusal(push(toy))
    assert hub.files(REPOSITORY) == {"x": b"2"}


def test_no_such_repository(hub: WritableHub, tmp_path: Path) -> None:
    assert "no data set me/covariances" in refusal(pull(tmp_path))
    hub.put(REPOSITORY, {"x": b"1"})
    assert "no kscli pushed to it" in refusal(pull(tmp_path))
    wrong = kscli("pull", "covariances", "--dir", tmp_path)
    assert wrong.exit_code == 2
    assert "OWNER/NAME" in wrong.stderr


def test_nothing_to_push(hub: WritableHub, toy: Path, tmp_path: Path) -> None:
    assert "kscli run --model toy" in refusal(push(tmp_path / "empty"))
    (toy / "toy" / "cov.h5").unlink()
    assert "does not exist" in refusal(push(toy, "--only", "cov"))
    assert push(toy, "--only", "covs").exit_code == 2
    assert hub.requests == []
