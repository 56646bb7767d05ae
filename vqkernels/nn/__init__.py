"""Quantizers as modules: codebooks, estimators, upkeep and the modules that join them.

Every file of the folders estimators, codebooks and quantizers is imported here, so that a new one puts its short names
into `METHODS` by being there.
"""

import importlib
import pkgutil

from vqkernels.nn.build import build as build
from vqkernels.nn.codebooks import AffineCodebook as AffineCodebook
from vqkernels.nn.codebooks import AffineEMACodebook as AffineEMACodebook
from vqkernels.nn.codebooks import Codebook as Codebook
from vqkernels.nn.codebooks import EMACodebook as EMACodebook
from vqkernels.nn.codebooks import HyperNetCodebook as HyperNetCodebook
from vqkernels.nn.codebooks import ProjectedCodebook as ProjectedCodebook
from vqkernels.nn.codebooks import SimVQCodebook as SimVQCodebook
from vqkernels.nn.estimators import NSVQ as NSVQ
from vqkernels.nn.estimators import STE as STE
from vqkernels.nn.estimators import Choice as Choice
from vqkernels.nn.estimators import ConstantTemperature as ConstantTemperature
from vqkernels.nn.estimators import Context as Context
from vqkernels.nn.estimators import CosineTemperature as CosineTemperature
from vqkernels.nn.estimators import DiVeQ as DiVeQ
from vqkernels.nn.estimators import DiVeQDetach as DiVeQDetach
from vqkernels.nn.estimators import Estimate as Estimate
from vqkernels.nn.estimators import Estimator as Estimator
from vqkernels.nn.estimators import ExponentialTemperature as ExponentialTemperature
from vqkernels.nn.estimators import Gumbel as Gumbel
from vqkernels.nn.estimators import LinearTemperature as LinearTemperature
from vqkernels.nn.estimators import Rotation as Rotation
from vqkernels.nn.estimators import SFDiVeQ as SFDiVeQ
from vqkernels.nn.estimators import SFDiVeQDetach as SFDiVeQDetach
from vqkernels.nn.estimators import Stochastic as Stochastic
from vqkernels.nn.estimators import TemperatureSchedule as TemperatureSchedule
from vqkernels.nn.methods import METHODS as METHODS
from vqkernels.nn.methods import Method as Method
from vqkernels.nn.methods import register as register
from vqkernels.nn.quantizers import BSQ as BSQ
from vqkernels.nn.quantizers import FSQ as FSQ
from vqkernels.nn.quantizers import LFQ as LFQ
from vqkernels.nn.quantizers import RPQ as RPQ
from vqkernels.nn.quantizers.base import Quantized as Quantized
from vqkernels.nn.quantizers.base import Quantizer as Quantizer
from vqkernels.nn.quantizers.product import Product as Product
from vqkernels.nn.quantizers.residual import Residual as Residual
from vqkernels.nn.quantizers.sharded import ShardedVectorQuantizer as ShardedVectorQuantizer
from vqkernels.nn.quantizers.sharded import ignore_shards as ignore_shards
from vqkernels.nn.quantizers.vector import VectorQuantizer as VectorQuantizer
from vqkernels.nn.upkeep import Every as Every
from vqkernels.nn.upkeep import ImportanceReplacement as ImportanceReplacement
from vqkernels.nn.upkeep import KMeansInit as KMeansInit
from vqkernels.nn.upkeep import LatentMeans as LatentMeans
from vqkernels.nn.upkeep import LeastRecentlyUsed as LeastRecentlyUsed
from vqkernels.nn.upkeep import RepeatedKMeans as RepeatedKMeans
from vqkernels.nn.upkeep import Schedule as Schedule
from vqkernels.nn.upkeep import TwoPhase as TwoPhase
from vqkernels.nn.upkeep import Upkeep as Upkeep
from vqkernels.nn.upkeep import UpkeepReport as UpkeepReport
from vqkernels.nn.upkeep import kmeans as kmeans

for _folder in ("estimators", "codebooks", "quantizers"):
    for _file in pkgutil.iter_modules(importlib.import_module(f"{__name__}.{_folder}").__path__):
        importlib.import_module(f"{__name__}.{_folder}.{_file.name}")
