"""Fast, exact vector quantization for neural networks."""

from vqkernels.dispatch import BackendError as BackendError
from vqkernels.dispatch import use_backend as use_backend
from vqkernels.ops import code_sums as code_sums
from vqkernels.ops import directional as directional
from vqkernels.ops import diveq as diveq
from vqkernels.ops import nearest_code as nearest_code
from vqkernels.ops import nearest_segment as nearest_segment
from vqkernels.ops import prepare as prepare
from vqkernels.ops import sf_diveq as sf_diveq
from vqkernels.ops import straight_through as straight_through

__version__ = "0.1.0"
