"""Short names of quantizers that are nothing but other arguments of `VectorQuantizer`."""

from __future__ import annotations

from vqkernels.nn.codebooks.learned import Codebook
from vqkernels.nn.estimators.ste import STE
from vqkernels.nn.methods import Method, Spec, register


def _low_dimension(spec: Spec) -> Codebook:
    # 8 features or half of them; a direction needs two
    return Codebook(spec.num_codes, min(8, max(2, spec.dim // 2)), init="normal")


register(
    "cosine",
    Method(
        "directions alone are compared; z has length 1",
        source="Yu et al. 2022, l2-normalized codes",
        codebook=lambda spec: Codebook(spec.num_codes, spec.dim, init="normal"),
        estimator=lambda spec: STE(),
        options=lambda spec: {"metric": "cosine"},
    ),
)
register(
    "vqgan_fc",
    Method(
        "latents of many features: searched on the unit sphere of 8 or fewer, projected there and back",
        source="Yu et al. 2022 (VQGAN-FC)",
        codebook=_low_dimension,
        estimator=lambda spec: STE(),
        options=lambda spec: {"metric": "cosine", "dim": spec.dim},
    ),
)
