"""A quantizer as other libraries write them, and its face: for the tests of `convert` alone."""

import torch
from torch import nn

from vqkernels import nearest_code
from vqkernels.compat.face import Face, unserved
from vqkernels.compat.registry import register_face


class Peer(nn.Module):
    """Nearest codes by an expanded float32 distance, which errs far from the origin."""

    def __init__(self, dim, codes, beta=0.25, rare=False):
        super().__init__()
        self.beta, self.rare = beta, rare
        self.codebook = nn.Parameter(torch.randn(codes, dim))
        self.register_buffer("usage", torch.zeros(codes))
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)

    def forward(self, x):
        expanded = (
            x.square().sum(-1, keepdim=True) - 2 * x @ self.codebook.t() + self.codebook.square().sum(-1)
        )
        indices = expanded.argmin(-1)
        codes = self.codebook[indices]
        # a defect that some have: it counts in eval mode too
        self.usage += torch.bincount(indices.flatten(), minlength=len(self.usage))
        loss = (codes - x.detach()).square().mean() + self.beta * (codes.detach() - x).square().mean()
        return x + (codes - x).detach(), indices, loss


@register_face
class ToyFace(Face):
    """The same with the exact search."""

    peers = (f"{__name__}.Peer",)
    differences = ("Codes are counted in training alone.",)

    def __init__(self, dim, codes, beta=0.25, rare=False):
        super().__init__()
        if rare:
            unserved("ToyFace", "rare", rare, "Leave it out")
        self.beta = beta
        self.codebook = nn.Parameter(torch.randn(codes, dim))
        self.register_buffer("usage", torch.zeros(codes))

    @classmethod
    def options_of(cls, peer):
        codes, dim = peer.codebook.shape
        return {"dim": dim, "codes": codes, "beta": peer.beta, "rare": peer.rare}

    def pick(self, x):
        return nearest_code(x.detach(), self.codebook.detach()).indices

    def forward(self, x):
        indices = self.pick(x)
        codes = self.codebook[indices]
        if self.training:
            self.usage += torch.bincount(indices.flatten(), minlength=len(self.usage))
        loss = (codes - x.detach()).square().mean() + self.beta * (codes.detach() - x).square().mean()
        return x + (codes - x).detach(), indices, loss

    def sq_dist_of(self, x, indices):
        return (x.double() - self.codebook.double()[indices]).square().sum(-1)


class Wrong(ToyFace):
    """A face that picks something else."""

    peers = (f"{__name__}.Other",)

    def pick(self, x):
        return (super().pick(x) + 1) % len(self.codebook)


register_face(Wrong)


class Other(Peer):
    """A peer of another name."""


class Renamed(Peer):
    """A subclass that changes its constructor alone."""

    def __init__(self, dim):
        super().__init__(dim, 8)


class Changed(Peer):
    """A subclass with another forward."""

    def forward(self, x):
        return super().forward(2 * x)


class Model(nn.Module):
    """A quantizer between two layers, and batch statistics, which a forward in training mode moves."""

    def __init__(self, quantizer, dim=8):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(dim, dim), nn.BatchNorm1d(dim), nn.Dropout(0.5))
        self.quantizer = quantizer
        self.decoder = nn.Linear(dim, dim)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        z, _, loss = self.quantizer(self.encoder(x))
        return self.decoder(z), loss
