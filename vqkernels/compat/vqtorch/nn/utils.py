"""What vqtorch keeps beside its layers."""

from vqkernels.compat.vqtorch.nn.upkeep import lru_replacement as lru_replacement
