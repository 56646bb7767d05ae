"""Upkeep: how codes start and stay alive."""

from vqkernels.nn.upkeep.base import Upkeep as Upkeep
from vqkernels.nn.upkeep.base import UpkeepReport as UpkeepReport
from vqkernels.nn.upkeep.importance import ImportanceReplacement as ImportanceReplacement
from vqkernels.nn.upkeep.kmeans import kmeans as kmeans
from vqkernels.nn.upkeep.kmeans_init import KMeansInit as KMeansInit
from vqkernels.nn.upkeep.latent_means import LatentMeans as LatentMeans
from vqkernels.nn.upkeep.lru import LeastRecentlyUsed as LeastRecentlyUsed
from vqkernels.nn.upkeep.repeated_kmeans import RepeatedKMeans as RepeatedKMeans
from vqkernels.nn.upkeep.schedules import Every as Every
from vqkernels.nn.upkeep.schedules import Schedule as Schedule
from vqkernels.nn.upkeep.schedules import TwoPhase as TwoPhase
