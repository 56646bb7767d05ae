"""Any codebook with any estimator: the pair trains and compiles, or one error says at once why it cannot."""

import pytest
import torch
from conftest import INTERPRETED

from vqkernels.nn import METHODS, Codebook, VectorQuantizer
from vqkernels.nn.methods import Spec
from vqkernels.testing import DEVICE

D, K = 6, 8
SPEC = Spec(D, K, -1, 0.03, ())
# methods of one codebook and one estimator: a row for each that adds an estimator, a column for each other one
PLAIN = {name: method for name, method in METHODS.items() if method.make is None}
ESTIMATORS = [name for name, method in PLAIN.items() if method.codebook is None and method.options is None]
CODEBOOKS = ["learned", *(name for name in PLAIN if name not in ESTIMATORS)]
pytestmark = pytest.mark.skipif(INTERPRETED, reason="modules are tested beside the compiled backends")


def parts(codebook, estimator):
    """Fresh parts of a pair, and the further arguments of its quantizer."""
    method = PLAIN.get(codebook)
    made = Codebook(K, D) if method is None else method.codebook(SPEC)
    options = method.options(SPEC) if method is not None and method.options is not None else {}
    return made, PLAIN[estimator].estimator(SPEC), options


def refusal(codebook, estimator):
    """The two reasons there are, or None: see `vqkernels.nn.codebooks`."""
    if codebook.counts_codes and not estimator.chooses_codes:
        return r"codebook must not count rows per code for .*; got EMACodebook\. Pass"
    if getattr(estimator, "sync", 0) > 0 and not codebook.learned:
        return r"codebook must .*; got EMACodebook\. "
    return None


def step(quantizer, optimizer, run, x):
    """One training step; gradients of x and of all parameters."""
    optimizer.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(4)
    z, _, loss = run(x)
    # not the sum of squares: that is a constant on the unit sphere
    (z * torch.linspace(1, 2, D, device=DEVICE)).sum().add(loss).backward()
    gradients = {name: parameter.grad for name, parameter in quantizer.named_parameters()}
    optimizer.step()
    return z, loss, x.grad, gradients


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_pair(codebook, estimator):
    torch._dynamo.reset()
    made, how, options = parts(codebook, estimator)
    words = refusal(made, how)
    if words is not None:
        with pytest.raises(ValueError, match=words):
            VectorQuantizer(made, how, **options)
        return
    quantizer = VectorQuantizer(made, how, **options).to(DEVICE)
    optimizer = torch.optim.Adam([*quantizer.parameters(), torch.nn.Parameter(torch.zeros(()))], 1e-2)
    quantizer.follow(optimizer)
    compiled = torch.compile(quantizer, fullgraph=True, backend="aot_eager")
    before = quantizer.export()
    for run in (compiled, quantizer, compiled):
        x = torch.randn(3, 20, D, device=DEVICE)
        z, loss, dx, gradients = step(quantizer, optimizer, run, x)
        assert z.isfinite().all() and loss.isfinite() and dx.isfinite().all() and dx.any()
        for name, gradient in gradients.items():
            assert gradient is not None and gradient.isfinite().all() and gradient.any(), name
    assert not torch.equal(before, quantizer.export())
    quantizer.eval()
    z, indices, _ = torch.compile(quantizer, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(z, quantizer(x).z) and torch.equal(quantizer.decode(indices), z)


def test_the_grid_has_every_pair_of_the_table():
    assert {"ste", "diveq", "sf_diveq", "nsvq"} <= set(ESTIMATORS)
    assert {"learned", "ema", "affine", "affine_ema", "mq", "simvq", "vqgan_lc", "vqgan_fc", "cosine"} <= set(
        CODEBOOKS
    )
    refused = {
        (codebook, estimator)
        for codebook in CODEBOOKS
        for estimator in ESTIMATORS
        if refusal(*parts(codebook, estimator)[:2]) is not None
    }
    assert {("ema", "sf_diveq"), ("ema", "sf_diveq_detach"), ("ema", "sync")} <= refused
    assert {codebook for codebook, _ in refused} == {"ema"}
