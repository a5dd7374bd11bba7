"""Where a model's artifacts lie."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kscli.models.aliases import slug


@dataclass(frozen=True)
class Places:
    """Where a model's artifacts lie: `root/SLUG/{cov,keys,pmatrix,stats}.h5` and `figures/`.

    Those of an editor's p are pmatrix-EDITOR.h5 and stats-EDITOR.h5.
    """

    root: Path
    model: str

    @property
    def folder(self) -> Path:
        """The model's folder."""
        return self.root / slug(self.model)

    @property
    def figures(self) -> Path:
        """The folder of the model's figures."""
        return self.folder / "figures"

    def path(self, kind: str, editor: str = "") -> Path:
        """The artifact of a kind, cov, keys, pmatrix or stats, or of an editor's p."""
        return self.folder / file_name(kind, editor)


def file_name(kind: str, editor: str = "") -> str:
    """The name of an artifact of a kind; of an editor's p, if one is named."""
    return f"{kind}-{editor}.h5" if editor else f"{kind}.h5"
