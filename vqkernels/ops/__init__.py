"""Ops: one file each, with the contract, the reference, the backends and the autograd."""

from vqkernels.ops.code_sums import CodeSums as CodeSums
from vqkernels.ops.code_sums import code_sums as code_sums
from vqkernels.ops.code_sums import code_sums_op as _code_sums
from vqkernels.ops.directional import directional as directional
from vqkernels.ops.directional import directional_backward_op as _directional_backward
from vqkernels.ops.directional import directional_op as _directional
from vqkernels.ops.diveq import diveq as diveq
from vqkernels.ops.diveq import sf_diveq as sf_diveq
from vqkernels.ops.gumbel_code import GumbelCode as GumbelCode
from vqkernels.ops.gumbel_code import gumbel_code as gumbel_code
from vqkernels.ops.gumbel_code import gumbel_code_backward_op as _gumbel_code_backward
from vqkernels.ops.gumbel_code import gumbel_code_op as _gumbel_code
from vqkernels.ops.nearest_code import NearestCode as NearestCode
from vqkernels.ops.nearest_code import PreparedCodebook as PreparedCodebook
from vqkernels.ops.nearest_code import nearest_code as nearest_code
from vqkernels.ops.nearest_code import nearest_code_op as _nearest_code
from vqkernels.ops.nearest_code import prepare as prepare
from vqkernels.ops.nearest_segment import NearestSegment as NearestSegment
from vqkernels.ops.nearest_segment import nearest_segment as nearest_segment
from vqkernels.ops.nearest_segment import nearest_segment_op as _nearest_segment
from vqkernels.ops.philox import philox_op as _philox
from vqkernels.ops.sample_code import sample_code as sample_code
from vqkernels.ops.sample_code import sample_code_op as _sample_code
from vqkernels.ops.straight_through import StraightThrough as StraightThrough
from vqkernels.ops.straight_through import straight_through as straight_through
from vqkernels.ops.straight_through import straight_through_backward_op as _straight_through_backward
from vqkernels.ops.straight_through import straight_through_op as _straight_through
from vqkernels.ops.unit_rows import unit_rows as unit_rows
from vqkernels.ops.unit_rows import unit_rows_backward_op as _unit_rows_backward
from vqkernels.ops.unit_rows import unit_rows_op as _unit_rows

# what `info`, the tests and the benches walk over
OPS = {
    op.name: op
    for op in (
        _nearest_code,
        _nearest_segment,
        _directional,
        _directional_backward,
        _straight_through,
        _straight_through_backward,
        _code_sums,
        _gumbel_code,
        _gumbel_code_backward,
        _sample_code,
        _unit_rows,
        _unit_rows_backward,
        _philox,
    )
}
