"""The layers of vqtorch."""

from vqkernels.compat.vqtorch.nn import utils as utils
from vqkernels.compat.vqtorch.nn.affine import AffineTransform as AffineTransform
from vqkernels.compat.vqtorch.nn.gvq import GroupVectorQuant as GroupVectorQuant
from vqkernels.compat.vqtorch.nn.rvq import ResidualVectorQuant as ResidualVectorQuant
from vqkernels.compat.vqtorch.nn.vq import VectorQuant as VectorQuant
