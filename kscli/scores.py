"""The scores that papers on editing report, by their definitions: from numbers to numbers.

ES, PS, NS, S, GE and RS are those of ROME (Meng et al. 2022a, section 3.4, and the authors'
experiments/py/eval_utils_counterfact.py and experiments/summarize.py); reliability,
generalisation, locality and portability those of EasyEdit (easyeditor/evaluate). All are shares,
from 0 to 1, but GE, which is in bits. A score that has nothing to be computed from is NaN.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Real = NDArray[np.float64]


@dataclass(frozen=True)
class Score:
    """A score of one edit: what it is, and the kind of question that it needs, if any."""

    meaning: str
    needs: str = ""


SCORES: Mapping[str, Score] = {
    "ES": Score("whether the new target is likelier than the true one, a token"),
    "PS": Score("the share of paraphrases where it is", "paraphrase"),
    "NS": Score("the share of neighbourhood prompts where the true one is", "neighbourhood"),
    "GE": Score("the entropy of n-grams of text that is made up of the subject", "generation"),
    "RS": Score("the TF-IDF cosine of that text with reference texts", "reference"),
    "reliability": Score("the share of the new target's tokens that are the likeliest in place"),
    "generalisation": Score("the same share after paraphrases", "paraphrase"),
    "locality": Score("the share of other answers' tokens that are said as before", "locality"),
    "portability": Score("the share of the tokens of what follows from the edit", "portability"),
    "says": Score("whether the new target is said first, freely and greedily"),
}
"""The scores of an edit. S, the harmonic mean of ES, PS and NS, is one of all edits."""

HARMONIC = ("ES", "PS", "NS")

# ROME's compute_n_gram_entropy: n, and the weight of the entropy of n-grams.
_ENTROPIES = ((2, 2 / 3), (3, 4 / 3))
_WORD = re.compile(r"\w+|[^\w\s]")


def likelier_share(first: Sequence[float], second: Sequence[float]) -> float:
    """The share of places where the first log-probability a token is above the second.

    ES and PS of (new, true), NS of (true, new).
    """
    return _mean([float(a > b) for a, b in zip(first, second, strict=True)])


def token_accuracy(said: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]]) -> float:
    """The mean over targets of the share of their tokens that are the likeliest in their places."""
    return _mean(
        [
            _mean([float(a == b) for a, b in zip(of_one, target, strict=True)])
            for of_one, target in zip(said, wanted, strict=True)
        ]
    )


def harmonic_mean(shares: Real) -> Real:
    """The harmonic mean over the last axis; 0 where a share is 0, NaN where one is."""
    with np.errstate(divide="ignore"):
        found: Real = shares.shape[-1] / (1 / shares).sum(axis=-1)
    return found


def n_gram_entropy(text: str) -> float:
    """GE of a text: the mean of 2/3 H_2 and 4/3 H_3, H_n the entropy of its n-grams in bits.

    Words and marks are parted by a rule of their own, where ROME's code takes nltk's.
    """
    words = _WORD.findall(text)
    found = []
    for n, weight in _ENTROPIES:
        counts = Counter(zip(*(words[at:] for at in range(n)), strict=False))
        total = counts.total()
        shares = [count / total for count in counts.values()]
        found.append(-weight * sum(share * math.log2(share) for share in shares))
    return sum(found) / len(found)


class TfIdf:
    """RS: the cosine of two texts' TF-IDF vectors, over the words of some reference texts.

    As scikit-learn's TfidfVectorizer: a word counts tf (ln((1 + n) / (1 + df)) + 1), n the number
    of reference texts and df of those that have it. ROME's code takes df from Wikipedia.
    """

    def __init__(self, references: Sequence[str]) -> None:
        n = len(references)
        df = Counter(word for text in references for word in set(_words(text)))
        self._weight = {word: math.log((1 + n) / (1 + count)) + 1 for word, count in df.items()}

    def cosine(self, text: str, other: str) -> float:
        """The cosine of two texts; NaN where one has no word of the references."""
        first, second = self._vector(text), self._vector(other)
        norms = [math.sqrt(sum(value**2 for value in each.values())) for each in (first, second)]
        if not all(norms):
            return math.nan
        product = sum(value * second.get(word, 0.0) for word, value in first.items())
        return product / math.prod(norms)

    def _vector(self, text: str) -> dict[str, float]:
        counts = Counter(word for word in _words(text) if word in self._weight)
        return {word: count * self._weight[word] for word, count in counts.items()}


def _words(text: str) -> list[str]:
    """The words of two letters or more, in lower case, as scikit-learn takes them."""
    return re.findall(r"\b\w\w+\b", text.lower())


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
