"""What edits must not disturb: a corpus in, key moments and the null-space projector P out.

The paper's section 3.2: keys K0 of preserved knowledge have the moment C0 = K0^T K0 / tokens, and
P projects onto the directions whose eigenvalues count as zero. Statistics that other programs wrote
are read by the functions ``read_*``.
"""

from alphaedit_peft.nullspace.import_statistics import (
    ForeignFileError,
    read_covariances,
    read_projector,
    read_second_moments,
)
from alphaedit_peft.nullspace.space import KeyMoments, NullSpace

__all__ = [
    "ForeignFileError",
    "KeyMoments",
    "NullSpace",
    "read_covariances",
    "read_projector",
    "read_second_moments",
]
