"""Quantizers: modules from latents to codes and back."""

from vqkernels.nn.quantizers.base import Quantized as Quantized
from vqkernels.nn.quantizers.base import Quantizer as Quantizer
from vqkernels.nn.quantizers.fsq import FSQ as FSQ
from vqkernels.nn.quantizers.lfq import BSQ as BSQ
from vqkernels.nn.quantizers.lfq import LFQ as LFQ
from vqkernels.nn.quantizers.product import Product as Product
from vqkernels.nn.quantizers.residual import Residual as Residual
from vqkernels.nn.quantizers.rpq import RPQ as RPQ
from vqkernels.nn.quantizers.vector import VectorQuantizer as VectorQuantizer
