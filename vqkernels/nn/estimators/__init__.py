"""Estimators: how a gradient crosses the quantization, and what evaluation returns instead."""

from vqkernels.nn.estimators.base import Choice as Choice
from vqkernels.nn.estimators.base import Context as Context
from vqkernels.nn.estimators.base import Estimate as Estimate
from vqkernels.nn.estimators.base import Estimator as Estimator
from vqkernels.nn.estimators.diveq import NSVQ as NSVQ
from vqkernels.nn.estimators.diveq import DiVeQ as DiVeQ
from vqkernels.nn.estimators.diveq import DiVeQDetach as DiVeQDetach
from vqkernels.nn.estimators.gumbel import Gumbel as Gumbel
from vqkernels.nn.estimators.rotation import Rotation as Rotation
from vqkernels.nn.estimators.sf_diveq import SFDiVeQ as SFDiVeQ
from vqkernels.nn.estimators.sf_diveq import SFDiVeQDetach as SFDiVeQDetach
from vqkernels.nn.estimators.ste import STE as STE
from vqkernels.nn.estimators.stochastic import Stochastic as Stochastic
from vqkernels.nn.estimators.temperature import ConstantTemperature as ConstantTemperature
from vqkernels.nn.estimators.temperature import CosineTemperature as CosineTemperature
from vqkernels.nn.estimators.temperature import ExponentialTemperature as ExponentialTemperature
from vqkernels.nn.estimators.temperature import LinearTemperature as LinearTemperature
from vqkernels.nn.estimators.temperature import TemperatureSchedule as TemperatureSchedule
