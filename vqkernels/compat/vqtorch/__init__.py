"""Faces of vqtorch's quantizers (Huh et al. 2023): only the import line changes.

`from vqkernels.compat.vqtorch.nn import VectorQuant` stands for `from vqtorch.nn import VectorQuant`.
"""

from vqkernels.compat.vqtorch import nn as nn
from vqkernels.compat.vqtorch.nn import AffineTransform as AffineTransform
from vqkernels.compat.vqtorch.nn import GroupVectorQuant as GroupVectorQuant
from vqkernels.compat.vqtorch.nn import ResidualVectorQuant as ResidualVectorQuant
from vqkernels.compat.vqtorch.nn import VectorQuant as VectorQuant
from vqkernels.compat.vqtorch.utils import get_vq_layers as get_vq_layers
from vqkernels.compat.vqtorch.utils import is_vq as is_vq
from vqkernels.compat.vqtorch.utils import is_vqn as is_vqn
from vqkernels.compat.vqtorch.utils import no_vq as no_vq
