"""Upkeep: how codes start and stay alive."""

from vqkernels.nn.upkeep.base import Upkeep as Upkeep
from vqkernels.nn.upkeep.importance import ImportanceReplacement as ImportanceReplacement
from vqkernels.nn.upkeep.latent_means import LatentMeans as LatentMeans
from vqkernels.nn.upkeep.schedules import Schedule as Schedule
from vqkernels.nn.upkeep.schedules import TwoPhase as TwoPhase
