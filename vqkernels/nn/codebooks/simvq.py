"""Codebooks whose basis is frozen: only a linear layer learns, and moves all codes together."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vqkernels.checks import check_count, refuse
from vqkernels.nn.codebooks.learned import Codebook
from vqkernels.nn.estimators.ste import STE
from vqkernels.nn.methods import Method, Spec, register


class ProjectedCodebook(Codebook):
    """A given, frozen basis and a learned projector: codes = basis W^T + b (VQGAN-LC, Zhu et al. 2024a).

    Args:
        basis: (K, d'), finite, such as clustered features of a pretrained encoder; copied.
        dim: D, features of a code.
        dtype: of basis and projector; float32 when omitted.
        device: where to put them; where `basis` is when omitted.

    Raises:
        TypeError, ValueError: `basis` is not such a matrix, or `dim` or `dtype` is not as of `Codebook`.
    """

    assignable = False

    def __init__(
        self,
        basis: Tensor,
        dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ):
        name = type(self).__name__
        check_basis(name, basis)
        check_count(name, "dim", dim, minimum=1)
        device = basis.device if device is None else device
        super().__init__(*basis.shape, dtype=dtype, device=device)
        self.weight.copy_(basis.detach())
        self.project = nn.Linear(basis.shape[1], dim, dtype=dtype, device=device)

    def _keep(self, weight: Tensor) -> None:
        self.register_buffer("weight", weight)

    @property
    def dim(self) -> int:
        """D."""
        return self.project.out_features

    def codes(self) -> Tensor:
        return self.project(self.weight)


class SimVQCodebook(ProjectedCodebook):
    """A frozen Gaussian basis and a learned linear layer: codes = basis W^T + b (SimVQ, Zhu et al. 2024b).

    The basis is drawn from N(0, 1/D), and the layer has a bias, as in the released code; the paper's formula has none.

    Args:
        num_codes, dim, dtype, device: as of `Codebook`.

    Raises:
        TypeError, ValueError: as of `Codebook`.
    """

    def __init__(
        self,
        num_codes: int,
        dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ):
        name = type(self).__name__
        check_count(name, "num_codes", num_codes, minimum=1)
        check_count(name, "dim", dim, minimum=1)
        super().__init__(
            torch.randn(num_codes, dim, device=device) * dim**-0.5, dim, dtype=dtype, device=device
        )


def check_basis(op: str, basis: Tensor, num_codes: int | None = None) -> None:
    """A finite (K, d') matrix, with `num_codes` rows where that is given.

    Raises:
        TypeError, ValueError: it is not.
    """
    if not isinstance(basis, Tensor) or not basis.is_floating_point():
        got = basis.dtype if isinstance(basis, Tensor) else type(basis).__name__
        refuse(TypeError, op, "basis", "be a floating-point tensor", got, "Pass features as torch.float32")
    wanted = "K" if num_codes is None else num_codes
    if basis.dim() != 2 or 0 in basis.shape or len(basis) != (len(basis) if num_codes is None else num_codes):
        fix = "Pass one row of features per code, such as cluster centres"
        refuse(ValueError, op, "basis", f"be ({wanted}, d')", f"shape {tuple(basis.shape)}", fix)
    # on the meta device there is no value to look at
    if not basis.is_meta and not basis.isfinite().all():
        refuse(ValueError, op, "basis", "be finite", "a NaN or Inf", "Leave such features out")


def _projected(spec: Spec) -> Codebook:
    if spec.basis is None:
        return ProjectedCodebook(torch.randn(spec.num_codes, spec.dim) * spec.dim**-0.5, spec.dim)
    check_basis("build", spec.basis, spec.num_codes)
    return ProjectedCodebook(spec.basis, spec.dim)


register(
    "simvq",
    Method(
        "very large codebooks stay in use: one layer moves a frozen Gaussian basis",
        source="Zhu et al. 2024b (SimVQ)",
        codebook=lambda spec: SimVQCodebook(spec.num_codes, spec.dim),
        estimator=lambda spec: STE(),
        upkeep=False,
    ),
)
register(
    "vqgan_lc",
    Method(
        "large codebooks from pretrained features: pass them as basis=; without one it is Gaussian",
        source="Zhu et al. 2024a (VQGAN-LC)",
        codebook=_projected,
        estimator=lambda spec: STE(),
        upkeep=False,
        basis=True,
    ),
)
