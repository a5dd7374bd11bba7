"""Where a model's artifacts lie."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kscli.models.aliases import slug


@dataclass(frozen=True)
class Places:
    """Where a model's artifacts lie: `root/SLUG/{cov,keys,pmatrix,stats}.h5` and `figures/`."""

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

    def path(self, kind: str) -> Path:
        """The artifact of a kind: cov, keys, pmatrix or stats."""
        return self.folder / f"{kind}.h5"
