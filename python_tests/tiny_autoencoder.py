"""An autoencoder small enough to differentiate by hand, in float64, and a codebook that a net generates."""

from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from vqkernels.nn import STE, Codebook, VectorQuantizer
from vqkernels.testing import DEVICE
from vqkernels.train.learners.procedure import split_parameters

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


def exact_indirect(model, x, xi):
    """The indirect gradient of eq. 14 without a difference: autograd sees the mixed derivative once no sg hides it."""
    quantizer, phi = model.quantizer, [p for p in split_parameters(model)[1]]
    phi = [p for p in phi if all(p is not q for q in model.decoder.parameters())]
    theta = list(model.decoder.parameters())

    def losses():
        out = quantizer(model.encoder(x))
        return F.mse_loss(model.decoder(out.z), x) + out.loss

    start = [p.detach().clone() for p in phi + theta]
    with quantizer.unobserved():
        indices = quantizer(model.encoder(x)).indices[..., 0]
        tentative = torch.autograd.grad(losses(), phi + theta)
        with torch.no_grad():
            for p, g in zip(phi + theta, tentative, strict=True):
                p.sub_(xi * g)
        v = torch.autograd.grad(losses(), phi)
        with torch.no_grad():
            for p, value in zip(phi + theta, start, strict=True):
                p.copy_(value)
    # plain functions, which autograd derives twice
    scaled = partial(F.normalize, dim=-1) if quantizer.metric == "cosine" else torch.Tensor.clone
    into = torch.Tensor.clone if quantizer.project_in is None else quantizer.project_in
    code = scaled(quantizer.codebook.codes())[indices]
    open_loss = (
        quantizer.estimator.codebook_weight
        * (scaled(into(model.encoder(x).movedim(quantizer.channel_dim, -1))) - code).square().mean()
    )
    slope = torch.autograd.grad(open_loss, phi, create_graph=True, allow_unused=True)
    along = sum((s * d).sum() for s, d in zip(slope, v, strict=True) if s is not None)
    found = torch.autograd.grad(along, split_parameters(model)[0], materialize_grads=True)
    return -xi * torch.cat([g.flatten() for g in found])


def rounding(*tensors, ops=1000):
    """What float64 may lose in about `ops` operations on numbers of this size."""
    return ops * 2.0**-52 * max(float(t.abs().max()) for t in tensors)


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
