"""What the model answers to the paraphrases of the facts, before and after edits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kscli.editing.examination import Examination, changed
from kscli.facts import Fact
from kscli.models.loading import LoadedModel
from kscli.reporter import SILENT, Reporter

Mask = NDArray[np.bool_]


class Paraphrases:
    """The q paraphrases of facts, in the order of the file; those of facts that are `asked` (m,).

    `known` (q,): whether the model, as it is when this is made, answers with the fact's target.
    """

    def __init__(
        self, model: LoadedModel, facts: Sequence[Fact], asked: Mask, reporter: Reporter = SILENT
    ) -> None:
        pairs = [
            (index, question.prompt)
            for index, fact in enumerate(facts)
            for question in fact.questions
            if question.kind == "paraphrase"
        ]
        self.known: Mask = np.zeros(len(pairs), dtype=bool)
        chosen = [place for place, (index, _) in enumerate(pairs) if asked[index]]
        # A paraphrase is a whole text, and so a prompt of nothing but its subject.
        as_facts = [Fact("{}", pairs[at][1], facts[pairs[at][0]].target) for at in chosen]
        answers: tuple[tuple[int, ...], ...] = ()
        said: list[bool] = []
        if as_facts:
            examination = Examination(model, as_facts)
            answers = examination.all_facts(reporter).answers
            said = [
                answer == cloze.target_ids
                for answer, cloze in zip(answers, examination.true, strict=True)
            ]
            self.known[chosen] = said
        of_known = [each for each, one in zip(as_facts, said, strict=True) if one]
        self._examination = Examination(model, of_known) if of_known else None
        self._before = [answer for answer, one in zip(answers, said, strict=True) if one]

    def changed(self, reporter: Reporter = SILENT) -> Mask:
        """Which of the known ones the model now answers otherwise, (q,); False for all others."""
        found = np.zeros_like(self.known)
        if self._examination:
            answers = self._examination.all_facts(reporter).answers
            found[self.known] = changed(answers, self._before)
        return found
