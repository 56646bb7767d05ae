"""Quantizers as modules: codebooks, estimators, upkeep and the module that joins them."""

from vqkernels.nn.build import METHODS as METHODS
from vqkernels.nn.build import Method as Method
from vqkernels.nn.build import build as build
from vqkernels.nn.codebooks import Codebook as Codebook
from vqkernels.nn.codebooks import EMACodebook as EMACodebook
from vqkernels.nn.estimators import NSVQ as NSVQ
from vqkernels.nn.estimators import STE as STE
from vqkernels.nn.estimators import DiVeQ as DiVeQ
from vqkernels.nn.estimators import DiVeQDetach as DiVeQDetach
from vqkernels.nn.estimators import Estimator as Estimator
from vqkernels.nn.estimators import SFDiVeQ as SFDiVeQ
from vqkernels.nn.estimators import SFDiVeQDetach as SFDiVeQDetach
from vqkernels.nn.quantizer import Quantized as Quantized
from vqkernels.nn.quantizer import VectorQuantizer as VectorQuantizer
from vqkernels.nn.upkeep import ImportanceReplacement as ImportanceReplacement
from vqkernels.nn.upkeep import LatentMeans as LatentMeans
from vqkernels.nn.upkeep import Schedule as Schedule
from vqkernels.nn.upkeep import TwoPhase as TwoPhase
from vqkernels.nn.upkeep import Upkeep as Upkeep
