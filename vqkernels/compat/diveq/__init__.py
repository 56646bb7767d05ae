"""Faces of the package diveq 0.1.3: change `from diveq import DIVEQ` to `from vqkernels.compat.diveq import DIVEQ`."""

from vqkernels.compat.diveq.product import ProductDIVEQ as ProductDIVEQ
from vqkernels.compat.diveq.product import ProductSFDIVEQ as ProductSFDIVEQ
from vqkernels.compat.diveq.residual import ResidualDIVEQ as ResidualDIVEQ
from vqkernels.compat.diveq.residual import ResidualSFDIVEQ as ResidualSFDIVEQ
from vqkernels.compat.diveq.single import DIVEQ as DIVEQ
from vqkernels.compat.diveq.single import DIVEQDetach as DIVEQDetach
from vqkernels.compat.diveq.single_sf import SFDIVEQ as SFDIVEQ
from vqkernels.compat.diveq.single_sf import SFDIVEQDetach as SFDIVEQDetach
