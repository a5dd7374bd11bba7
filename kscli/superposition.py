"""pmatrix: P and Q of a set of facts, layer by layer.

P[i, j] = k_i^T C^-1 k_j / k_i^T C^-1 k_i (equation 16 and equation 18 of the paper). Row i is the
fact that is edited, column j the fact that is moved. On request P is instead p of an editor
(`kscli.editing.editor_p`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kscli.artifacts import (
    CovarianceFile,
    Existing,
    KeysFile,
    PMatrixAbout,
    Recipe,
    must_make,
    require_same_identity,
    write_artifact,
)
from kscli.cosines import cosine, whitened_cosine
from kscli.errors import NumericsError, UsageError
from kscli.files import require_other, require_writable
from kscli.layers import format_layers, layers_text
from kscli.records import quote
from kscli.reporter import SILENT, Reporter
from kscli.whitening import FEWEST_TOKENS_PER_DIMENSION, Whitening, whitening

if TYPE_CHECKING:
    from kscli.editing.editor_p import EditorOfP


@dataclass(frozen=True)
class Superposition:
    """One layer's matrices over m facts, each (m, m) float64, in the paper's terms.

    `Q` are the keys' inner products, `leverage` (m,) is k^T C^-1 k, `condition` the condition
    estimate of C scaled to unit diagonal, `dead_coordinates` how many coordinates were 0 on every
    token. `whitening_residual` is the largest |L^-1 C L^-T x - x| / |x| over 8 random x,
    `solve_residual` the largest |C (C^-1 k) - k| / |k| over the keys: how exactly the arithmetic
    did what Appendix B proves. `storage_error` estimates how far p is moved because C was stored
    in float32 (`Whitening.storage_error`). `paraphrase_p` (m,) is the mean p from each fact to its
    own paraphrases; NaN for a fact without any, None where there are none.
    """

    P: NDArray[np.float64]
    Q: NDArray[np.float64]
    leverage: NDArray[np.float64]
    condition: float
    dead_coordinates: int
    whitening_residual: float
    solve_residual: float
    storage_error: float
    paraphrase_p: NDArray[np.float64] | None = None

    @property
    def whitened_cosine(self) -> NDArray[np.float64]:
        """(m, m) k_i^T C^-1 k_j over the norms of both keys after whitening."""
        return whitened_cosine(self.P, self.leverage)

    @property
    def cosine(self) -> NDArray[np.float64]:
        """(m, m) k_i^T k_j over the norms of both keys."""
        return cosine(self.Q)


# What the storage of C in float32 costs p is said from here on.
NOTABLE_ERROR = 1e-3


def superposition(
    C: NDArray[np.float64], count: int, keys: NDArray[np.float64], ridge: float = 0.0
) -> Superposition:
    """The matrices of (m, d_m) keys under the second moment C, a mean over `count` tokens.

    `C` is overwritten. Raises NumericsError as `kscli.whitening.whitening` does, and as
    `superposition_in` does.
    """
    return superposition_in(whitening(C, count, ridge), keys)


def superposition_in(
    white: Whitening,
    keys: NDArray[np.float64],
    paraphrases: NDArray[np.float64] | None = None,
) -> Superposition:
    """The matrices of (m, d_m) keys under a second moment that is whitened.

    `paraphrases` (m, d_m) are the mean keys of each fact's paraphrases, NaN for a fact without.

    Raises NumericsError for a key that is 0, not finite, or not 0 where C is.
    """
    _check_keys(keys, white)
    whitened = white.whiten(keys)
    P = whitened.T @ whitened
    leverage = np.diagonal(P).copy()
    P /= leverage[:, None]  # equation 16, and for all pairs equation 18
    return Superposition(
        P=P,
        Q=keys @ keys.T,
        leverage=leverage,
        condition=white.condition,
        dead_coordinates=len(white.dead),
        whitening_residual=white.identity_residual(),
        solve_residual=white.solve_residual(keys, whitened),
        storage_error=white.storage_error(whitened),
        paraphrase_p=None
        if paraphrases is None
        else _p_to_own(white, whitened, leverage, paraphrases),
    )


def _p_to_own(
    white: Whitening,
    whitened: NDArray[np.float64],
    leverage: NDArray[np.float64],
    others: NDArray[np.float64],
) -> NDArray[np.float64]:
    """p from each fact to a key of its own in `others` (m, d_m).

    That is k_i^T C^-1 k'_i / k_i^T C^-1 k_i; NaN where the key is, and where it is not 0 in a
    coordinate that was 0 on every token.
    """
    found = np.full(len(others), np.nan)
    defined = np.isfinite(others).all(axis=1) & ~(others[:, white.dead] != 0).any(axis=1)
    products = whitened[:, defined] * white.whiten(others[defined])
    found[defined] = products.sum(axis=0) / leverage[defined]
    return found


class KeyOfFactError(NumericsError):
    """A fact, by its index in the keys, whose key does not allow p."""

    def __init__(self, index: int, what: str) -> None:
        super().__init__(f"the key of fact {index} {what}.")
        self.index = index
        self.what = what


def write_pmatrix(
    cov: CovarianceFile,
    keys: KeysFile,
    path: Path,
    *,
    layers: tuple[int, ...],
    ridge: float = 0.0,
    editor: EditorOfP | None = None,
    existing: Existing = Existing.REFUSE,
    reporter: Reporter = SILENT,
) -> bool:
    """Write pmatrix.h5 at `path` unless it is up to date; whether it was written.

    P is p of the `editor` where one is given. One layer's C is in memory at a time. Raises
    ArtifactError when `cov` and `keys` are about different models or lack a layer, or another file
    is in the way, and NumericsError, naming the layer and the fact, where p cannot be computed.
    """
    require_other(path, [cov.path, keys.path])
    recipe: Recipe = {
        "cov": cov.fingerprint,
        "keys": keys.fingerprint,
        "layers": format_layers(layers),
        "ridge": ridge,
    }
    if editor:
        recipe |= editor.recipe()
    if not must_make(path, "pmatrix", recipe, existing, reporter):
        return False
    require_writable(path, force=True)
    if not 0 <= ridge < float("inf"):
        raise UsageError(f"--ridge {ridge} must be 0 or more.")
    for warning in require_same_identity(cov, keys):
        reporter.warn(warning)
    keys.require_layers(layers)
    cov.require_layers(layers)
    about = keys.about.derive(
        PMatrixAbout,
        ridge=ridge,
        shard=str(cov.about.recipe.get("shard") or ""),
        editor=editor.name if editor else "",
        contexts=len(keys.contexts) if editor and editor.editor.contexts else 0,
        corpus=cov.about.corpus,
        corpus_identity=cov.about.corpus_identity,
        inputs={"cov": cov.fingerprint, "keys": keys.fingerprint},
        recipe=recipe,
    )
    count = cov.count
    _warn_of_few_tokens(cov, count, reporter)
    errors = {}
    with (
        write_artifact(path, "pmatrix", about, force=True) as writer,
        reporter.task("superposition", len(layers), unit="layers") as task,
    ):
        writer.layers(layers)
        writer.facts(keys)
        for index, layer in enumerate(layers):
            try:
                white = whitening(cov.second_moment(layer), count, ridge)
                paraphrases = keys.paraphrase_keys_of(layer)
                result = superposition_in(white, keys.keys_of(layer), paraphrases)
                found = dict(vars(result))
                if editor:
                    # It no longer follows from P.
                    found["whitened_cosine"] = result.whitened_cosine
                    found["P"], found["paraphrase_p"] = editor.p(cov, keys, layer, white)
            except KeyOfFactError as error:
                text = quote(keys.facts[error.index].text)
                raise NumericsError(
                    f"layer {layer}: the key of {text} (fact {error.index}) {error.what}."
                ) from error
            except NumericsError as error:
                raise NumericsError(f"layer {layer} of {cov.path}: {error}") from error
            for name, values in found.items():
                if values is not None:
                    writer.put(name, index, values)
            errors[layer] = result.storage_error
            task.advance()
    _warn_of_storage(errors, reporter)
    return True


def _warn_of_storage(errors: dict[int, float], reporter: Reporter) -> None:
    """Say at which layers the storage of C in float32 shows in p."""
    notable = [layer for layer, error in errors.items() if error > NOTABLE_ERROR]
    if not notable:
        return
    worst = max(notable, key=errors.__getitem__)
    reporter.warn(
        f"C is stored in float32, and that moves p at {layers_text(notable)}: by about "
        f"{errors[worst]:.1g} at layer {worst} for the pair that it moves most. Measure C on more, "
        "and more varied, text, or add a --ridge."
    )


def _warn_of_few_tokens(cov: CovarianceFile, count: int, reporter: Reporter) -> None:
    d_m = cov.about.d_m
    if count < FEWEST_TOKENS_PER_DIMENSION * d_m:
        reporter.warn(
            f"{cov.path} saw {count:,} tokens, {count / d_m:.1f} a dimension; under "
            f"{FEWEST_TOKENS_PER_DIMENSION} a dimension p is noisy. More text settles it."
        )


def _check_keys(keys: NDArray[np.float64], white: Whitening) -> None:
    bad = np.flatnonzero(~np.isfinite(keys).all(axis=1))
    if len(bad):
        raise KeyOfFactError(int(bad[0]), "is NaN or infinite")
    deviant = np.flatnonzero((keys[:, white.dead] != 0).any(axis=1))
    if len(deviant):
        raise KeyOfFactError(
            int(deviant[0]),
            f"is not 0 in one of {len(white.dead):,} coordinates that were 0 on every token of "
            "the corpus; measure C on more text, or add --ridge 1e-3",
        )
    zero = np.flatnonzero((keys == 0).all(axis=1))
    if len(zero):
        raise KeyOfFactError(int(zero[0]), "is 0, so p is not defined")
