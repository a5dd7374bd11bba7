"""The HDF5 files that carry results from one stage to the next.

`schema` declares what each kind of file holds and `values` what its numbers must be; `reading` and
`writing` go by them; `sealed` and `sealing` see that no change of a file goes unnoticed; `making`
says which files are up to date. An attribute is a typed field: `file.about.corpus_identity`.
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
from kscli.artifacts.sealed import SealedFile
from kscli.artifacts.sealing import SealedWriter, open_for_writing
from kscli.artifacts.writing import ArtifactWriter, write_artifact

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
    "SealedFile",
    "SealedWriter",
    "StatisticsAbout",
    "difference",
    "is_imported",
    "must_make",
    "open_for_writing",
    "require_same_identity",
    "write_artifact",
]
