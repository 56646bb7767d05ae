"""An autoencoder small enough to differentiate by hand, in float64, and a codebook that a net generates."""

from types import SimpleNamespace

import torch
from torch import nn

from vqkernels.nn import STE, Codebook, VectorQuantizer
from vqkernels.testing import DEVICE
from vqkernels.train.procedure import split_parameters

B, T, FEATURES, D, K = 6, 5, 4, 3, 7


class Generated(Codebook):
    """Codes = H(E) with two layers; notes how often it is observed."""

    assignable = False

    def __init__(self, num_codes, dim):
        super().__init__(num_codes, 2, init="normal", dtype=torch.float64)
        self.net = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, dim)).double()
        self.observed = self.committed = 0

    @property
    def dim(self):
        return self.net[-1].out_features

    def codes(self):
        return self.net(self.weight)

    def row_parameters(self):
        return [self.weight]

    def observe(self, x, indices):
        self.observed += 1

    def commit(self):
        self.committed += 1


def autoencoder(estimator=None, *, codebook=None, between=(), activation=nn.Tanh, seed=0, **options):
    """Encoder and decoder of two layers around a quantizer of latents (B, T, D)."""
    torch.manual_seed(seed)
    encoder = nn.Sequential(nn.Linear(FEATURES, 8), activation(), *between, nn.Linear(8, D))
    decoder = nn.Sequential(nn.Linear(D, 8), activation(), nn.Linear(8, FEATURES))
    estimator = STE(codebook_weight=1.3, commitment_weight=0.4) if estimator is None else estimator
    codebook = Generated(K, D) if codebook is None else codebook
    quantizer = VectorQuantizer(codebook, estimator, **options)
    model = (
        nn.ModuleDict({"encoder": encoder, "quantizer": quantizer, "decoder": decoder}).double().to(DEVICE)
    )
    return SimpleNamespace(module=model, **model)


def optimizers(model, kind=torch.optim.SGD, lr=0.05):
    """The two optimizers of a procedure."""
    codes, rest = split_parameters(model)
    return {"codebook_optimizer": kind(codes, lr=lr), "model_optimizer": kind(rest, lr=lr)}


def batch(seed=1):
    """Inputs (B, T, FEATURES)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, T, FEATURES, dtype=torch.float64, generator=generator).to(DEVICE)


def clear_batch(model):
    """Inputs for which no probe crosses the border of a cell or the kink of a ReLU, which are far for these rows."""
    x = torch.randn(4000, FEATURES, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).to(
        DEVICE
    )
    first, activation, last = model.encoder
    hidden = first(x)
    near = torch.cdist(last(activation(hidden)), model.quantizer.codes()).topk(2, largest=False).values
    clear = torch.minimum(near[:, 1] - near[:, 0], hidden.abs().amin(1))
    return x[clear.topk(B * T).indices].view(B, T, FEATURES)


def snapshot(model):
    """Every tensor of a model, copied."""
    return {name: value.clone() for name, value in model.module.state_dict().items()}


def same(first, second):
    """Whether two snapshots are equal bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class Passes:
    """Counts forward and backward passes through a module."""

    def __init__(self, module):
        self.forward = self.backward = 0
        module.register_forward_hook(self._seen)

    def _seen(self, module, args, output):
        self.forward += 1
        if output.requires_grad:
            output.register_hook(self._returned)

    def _returned(self, gradient):
        self.backward += 1
