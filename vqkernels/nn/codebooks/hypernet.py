"""Codebooks that a small network generates from a learned embedding."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vqkernels.checks import check_choice, check_count, refuse
from vqkernels.nn.codebooks.learned import Codebook
from vqkernels.nn.estimators.ste import STE
from vqkernels.nn.methods import Method, Spec, register

# the sizes that each kind has
_KINDS = {
    "identity": (),
    "linear-1": ("embedding_dim",),
    "linear-2": ("num_basis",),
    "mlp": ("embedding_dim", "hidden"),
}


class HyperNetCodebook(Codebook):
    """Codes that a hyper-net H makes of a learned Gaussian embedding E (MQ 4.1 and table 7).

        identity   codes = E                              E (K, D)
        linear-1   codes = E W^T + b                      E (K, d')
        linear-2   codes = M E                            E (K', D), M (K, K'): combinations of a basis
        mlp        codes = tanh(E W_1^T + b_1) W_2^T + b_2    E (K, d'), hidden d''

    A gradient of one code reaches all, through the layers they share. Layers start as torch starts them.

    Args:
        num_codes, dim, dtype, device: as of `Codebook`.
        kind: one of the four names above.
        embedding_dim: d' of linear-1 and mlp; 32 when omitted.
        hidden: d'' of mlp; 256 when omitted.
        num_basis: K' of linear-2; K when omitted.

    Raises:
        TypeError, ValueError: as of `Codebook`, or `kind` is none of them, or has no such size.
    """

    def __init__(
        self,
        num_codes: int,
        dim: int,
        *,
        kind: str = "mlp",
        embedding_dim: int | None = None,
        hidden: int | None = None,
        num_basis: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ):
        name = type(self).__name__
        check_count(name, "num_codes", num_codes, minimum=1)
        check_count(name, "dim", dim, minimum=1)
        has = _KINDS[check_choice(name, "kind", kind, tuple(_KINDS))]
        sizes = {}
        for size, value, default in (
            ("embedding_dim", embedding_dim, 32),
            ("hidden", hidden, 256),
            ("num_basis", num_basis, num_codes),
        ):
            if value is not None and size not in has:
                refuse(ValueError, name, size, f"be None for kind {kind!r}", value, "Leave it out")
            sizes[size] = check_count(name, size, default if value is None else value, minimum=1)
        rows = sizes["num_basis"] if kind == "linear-2" else num_codes
        features = sizes["embedding_dim"] if "embedding_dim" in has else dim
        super().__init__(rows, features, init="normal", dtype=dtype, device=device)
        self.kind, self._size = kind, (num_codes, dim)
        self.assignable = kind == "identity"
        where = {"dtype": dtype, "device": device}
        self.net = nn.Identity()
        if kind == "linear-1":
            self.net = nn.Linear(features, dim, **where)
        elif kind == "linear-2":
            self.net = nn.Linear(rows, num_codes, bias=False, **where)
        elif kind == "mlp":
            first = nn.Linear(features, sizes["hidden"], **where)
            self.net = nn.Sequential(first, nn.Tanh(), nn.Linear(sizes["hidden"], dim, **where))

    @property
    def num_codes(self) -> int:
        """K."""
        return self._size[0]

    @property
    def dim(self) -> int:
        """D."""
        return self._size[1]

    def codes(self) -> Tensor:
        if self.kind == "linear-2":
            # the layer combines rows, not features
            return self.net(self.weight.t()).t().contiguous()
        return self.net(self.weight)

    def row_parameters(self) -> list[Tensor]:
        return super().row_parameters() if self.assignable else []

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kind={self.kind!r}"


def _method(summary: str, kind: str) -> Method:
    def codebook(spec: Spec) -> Codebook:
        return HyperNetCodebook(spec.num_codes, spec.dim, kind=kind)

    # both weights are 1 in the paper's loss
    return Method(
        summary,
        source="MQ 4.1 and table 7",
        codebook=codebook,
        estimator=lambda spec: STE(codebook_weight=1.0, commitment_weight=1.0),
        upkeep=kind == "identity",
    )


register("mq", _method("codes made by an MLP, which all of them teach; the best hyper-net of MQ", "mlp"))
register("mq_identity", _method("MQ without a hyper-net, for comparison", "identity"))
register("mq_linear_1", _method("codes projected by one learned layer; fewer operations than mq", "linear-1"))
register("mq_linear_2", _method("codes as learned combinations of a basis; for comparison", "linear-2"))
