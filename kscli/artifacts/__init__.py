"""The HDF5 files that carry results from one stage to the next.

`schema` declares what each kind of file holds; `reading` and `writing` go by it; `making` says
which files are up to date. An attribute is a typed field: `file.about.corpus_identity`.
"""

from kscli.artifacts.making import Existing, difference, is_imported, must_make
from kscli.artifacts.reading import (
    EXPECTED_EQUAL,
    IDENTITY,
    Artifact,
    CovarianceFile,
    FactsFile,
    KeysFile,
    MatrixName,
    PMatrixFile,
    require_same_identity,
)
from kscli.artifacts.schema import (
    SCHEMAS,
    UNKNOWN,
    About,
    CovarianceAbout,
    EditsAbout,
    KeysAbout,
    Kind,
    PMatrixAbout,
    Recipe,
    StatisticsAbout,
)
from kscli.artifacts.writing import ArtifactWriter, open_for_writing, write_artifact

__all__ = [
    "EXPECTED_EQUAL",
    "IDENTITY",
    "SCHEMAS",
    "UNKNOWN",
    "About",
    "Artifact",
    "ArtifactWriter",
    "CovarianceAbout",
    "CovarianceFile",
    "EditsAbout",
    "Existing",
    "FactsFile",
    "KeysAbout",
    "KeysFile",
    "Kind",
    "MatrixName",
    "PMatrixAbout",
    "PMatrixFile",
    "Recipe",
    "StatisticsAbout",
    "difference",
    "is_imported",
    "must_make",
    "open_for_writing",
    "require_same_identity",
    "write_artifact",
]
