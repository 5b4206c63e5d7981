"""Which rows a step runs and where their cache lies: what every attention backend here reads.

Legend: R rows (one a request), T tokens of all rows, one row after another in order.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

IntArray = npt.NDArray[np.int32]


@dataclass(frozen=True)
class AttentionMetadata:
    """One step. Tensors lie on the model's device; the arrays are the same numbers on the host, for planning.

    query_start: [R + 1] int32; row r has tokens query_start[r] .. query_start[r + 1].
    context_lengths: [R] int32; tokens of row r that are cached when this step is done, its new ones included.
    page_table: [R, pages] int32; position p of row r lies in page page_table[r, p // page_size].
    cache_slots: [T] int64; where each token's key and value go: page x page_size + place in the page.
    """

    query_start: Tensor
    context_lengths: Tensor
    page_table: Tensor
    cache_slots: Tensor
    host_query_start: IntArray
    host_context_lengths: IntArray
