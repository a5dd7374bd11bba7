"""pmatrix: P and Q of a set of facts, layer by layer.

P[i, j] = k_i^T C^-1 k_j / k_i^T C^-1 k_i (equation 16 and equation 18 of the paper). Row i is the
fact that is edited, column j the fact that is moved. On request P is instead p of an editor
(`kscli.editing.editor_p`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
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
    in float32 (the standard error, `Whitening.storage_variance`, of the pair that is moved most).
    Of a layer of experts `condition` and the residuals are the largest of its blocks', and
    `dead_coordinates` are counted over all. `paraphrase_p` (m,) is the mean p from each fact to its
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
    block = Block(white, keys, np.arange(len(keys)), paraphrases)
    return superposition_of_blocks([block], len(keys))


@dataclass(frozen=True)
class Block:
    """One block of C, whitened, and the part `keys` (n, d_m) in it of the keys of facts `rows`.

    `paraphrases` (n, d_m) are the parts of the mean keys of these facts' paraphrases, NaN of a fact
    without; None where no fact has any.
    """

    white: Whitening
    keys: NDArray[np.float64]
    rows: NDArray[np.intp]
    paraphrases: NDArray[np.float64] | None = None


def superposition_of_blocks(blocks: Iterable[Block], m: int) -> Superposition:
    """The matrices of m keys of which C is taken block by block; one block is held at a time.

    k_i^T C^-1 k_j is then a sum over the blocks in which both keys are not 0: over the experts that
    both facts are routed to. Raises NumericsError as `superposition_in` does.
    """
    G, Q, variance = np.zeros((m, m)), np.zeros((m, m)), np.zeros((m, m))
    condition = whitening_residual = solve_residual = 0.0
    dead = 0
    own: NDArray[np.float64] | None = None
    for block in map(_without_zeros, blocks):
        white, keys = block.white, block.keys
        _check_keys(block)
        if not len(keys):
            continue
        whitened = white.whiten(keys)
        both = np.ix_(block.rows, block.rows)
        G[both] += whitened.T @ whitened
        Q[both] += keys @ keys.T
        variance[both] += white.storage_variance(whitened)
        if block.paraphrases is not None:
            own = np.zeros(m) if own is None else own
            own[block.rows] += _products_with_own(white, whitened, block.paraphrases)
        condition = max(condition, white.condition)
        dead += len(white.dead)
        whitening_residual = max(whitening_residual, white.identity_residual())
        solve_residual = max(solve_residual, white.solve_residual(keys, whitened))
    leverage = np.diagonal(G).copy()
    zero = np.flatnonzero(leverage == 0)
    if len(zero):
        raise KeyOfFactError(int(zero[0]), "is 0, so p is not defined")
    return Superposition(
        P=G / leverage[:, None],  # equation 16, and for all pairs equation 18
        Q=Q,
        leverage=leverage,
        condition=condition,
        dead_coordinates=dead,
        whitening_residual=whitening_residual,
        solve_residual=solve_residual,
        storage_error=float((np.sqrt(variance) / leverage[:, None]).max()),
        paraphrase_p=None if own is None else own / leverage,
    )


def _products_with_own(
    white: Whitening, whitened: NDArray[np.float64], others: NDArray[np.float64]
) -> NDArray[np.float64]:
    """k_i^T C^-1 k'_i of each fact's key, `whitened` (d_m, n), and one of its own in `others`.

    These are (n, d_m). The product is NaN where k'_i is, and where that is not 0 in a coordinate
    that was 0 on every token.
    """
    found = np.full(len(others), np.nan)
    defined = np.isfinite(others).all(axis=1) & ~(others[:, white.dead] != 0).any(axis=1)
    found[defined] = (whitened[:, defined] * white.whiten(others[defined])).sum(axis=0)
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
    if editor and cov.about.n_experts:
        editor.require_of_experts(cov)
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
    _warn_of_few_tokens(cov, layers, reporter)
    errors = {}
    with (
        write_artifact(path, "pmatrix", about, force=True) as writer,
        reporter.task("superposition", len(layers), unit="layers") as task,
    ):
        writer.layers(layers)
        writer.facts(keys)
        for index, layer in enumerate(layers):
            try:
                white = None
                if cov.about.n_experts:
                    result = superposition_of_experts(cov, keys, layer, ridge)
                    found = vars(result) | {"experts": keys.experts_of(layer)}
                else:
                    white = whitening(cov.second_moment(layer), count, ridge)
                    paraphrases = keys.paraphrase_keys_of(layer)
                    result = superposition_in(white, keys.keys_of(layer), paraphrases)
                    found = dict(vars(result))
                if editor:
                    # It no longer follows from P.
                    found["whitened_cosine"] = result.whitened_cosine
                    found["P"], found["paraphrase_p"] = editor.p(cov, keys, layer, ridge, white)
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


def superposition_of_experts(
    cov: CovarianceFile, keys: KeysFile, layer: int, ridge: float = 0.0
) -> Superposition:
    """The matrices of a layer of experts, of which C is taken expert by expert.

    Raises NumericsError, naming an expert and a fact that is routed to it, where it saw too few
    tokens.
    """
    blocks = (block for _, block in _blocks(cov, keys, layer, ridge))
    return superposition_of_blocks(blocks, len(keys.facts))


def superpositions_by_expert(
    cov: CovarianceFile, keys: KeysFile, layer: int, ridge: float = 0.0
) -> Iterator[tuple[int, tuple[Superposition, NDArray[np.intp]]]]:
    """By each expert's number, the matrices of it alone, and the facts that they are of.

    Experts that no fact is routed to are left out; shared ones are last. Raises as
    `superposition_of_experts` does.
    """
    for number, block in _blocks(cov, keys, layer, ridge):
        of_facts = _without_zeros(block)
        own = replace(of_facts, rows=np.arange(len(of_facts.rows)))
        yield number, (superposition_of_blocks([own], len(own.rows)), of_facts.rows)


def _blocks(
    cov: CovarianceFile, keys: KeysFile, layer: int, ridge: float
) -> Iterator[tuple[int, Block]]:
    """By their numbers, the experts to which facts are routed, and the shared ones."""
    paraphrases = keys.paraphrase_keys_of(layer)
    starts = dict(enumerate(np.cumsum([0, *cov.widths]).tolist()))
    for number, (rows, part) in keys.keys_by_expert(layer).items():
        try:
            white = whitening(*cov.block(layer, number), ridge)
        except NumericsError as error:
            text = quote(keys.facts[rows[0]].text)
            name = cov.block_name(number)
            raise NumericsError(f"{name}, to which {text} is routed: {error}") from error
        own = None
        if paraphrases is not None:
            own = paraphrases[rows, starts[number] : starts[number + 1]]
        yield number, Block(white, part, rows, own)


def _warn_of_few_tokens(cov: CovarianceFile, layers: tuple[int, ...], reporter: Reporter) -> None:
    d_m, enough = cov.about.d_m, FEWEST_TOKENS_PER_DIMENSION * cov.about.d_m
    if cov.about.n_experts:
        routed = np.concatenate([cov.routed(layer) for layer in layers])
        few = int((routed < enough).sum())
        if few:
            reporter.warn(
                f"{few:,} of the {len(routed):,} experts of {cov.path} saw under "
                f"{FEWEST_TOKENS_PER_DIMENSION} tokens a dimension, the least-used one "
                f"{routed.min():,}; p of a fact that is routed to one of them is noisy. More text "
                "settles it."
            )
    elif cov.count < enough:
        reporter.warn(
            f"{cov.path} saw {cov.count:,} tokens, {cov.count / d_m:.1f} a dimension; under "
            f"{FEWEST_TOKENS_PER_DIMENSION} a dimension p is noisy. More text settles it."
        )


def _without_zeros(block: Block) -> Block:
    """The block less the keys that are 0 in it, which add nothing."""
    there = (block.keys != 0).any(axis=1)
    if there.all():
        return block
    own = None if block.paraphrases is None else block.paraphrases[there]
    return Block(block.white, block.keys[there], block.rows[there], own)


def _check_keys(block: Block) -> None:
    bad = np.flatnonzero(~np.isfinite(block.keys).all(axis=1))
    if len(bad):
        raise KeyOfFactError(int(block.rows[bad[0]]), "is NaN or infinite")
    deviant = np.flatnonzero((block.keys[:, block.white.dead] != 0).any(axis=1))
    if len(deviant):
        raise KeyOfFactError(
            int(block.rows[deviant[0]]),
            f"is not 0 in one of {len(block.white.dead):,} coordinates that were 0 on every token "
            "of the corpus; measure C on more text, or add --ridge 1e-3",
        )
