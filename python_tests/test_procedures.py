"""All procedures: on the package's own model, in half precision, and on several processes as on one."""

import pytest
import torch
import torch.nn.functional as F
from processes import two_processes
from tiny_autoencoder import autoencoder, batch, exact_indirect, optimizers, rounding, snapshot

from vqkernels.models import VQVAE
from vqkernels.nn import STE, Codebook, DiVeQDetach, VectorQuantizer
from vqkernels.testing import DEVICE
from vqkernels.train.learners.alternated import Alternated
from vqkernels.train.learners.bilevel import MetaQuantization
from vqkernels.train.learners.procedure import Joint, Step, split_parameters

PROCEDURES = {
    "joint": Joint,
    "alternated": lambda *args, **pair: Alternated(*args, **pair, inner=3),
    "closed": lambda *args, **pair: MetaQuantization(*args, **pair, xi=0.3, hypergradient="closed"),
    "general": lambda *args, **pair: MetaQuantization(*args, **pair, xi=0.3, hypergradient="general"),
    "xi = 0": lambda *args, **pair: MetaQuantization(*args, **pair, xi=0),
}


@pytest.fixture(autouse=True)
def _one_thread():
    """Threads that wait for each other over a few rows cost more than they do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def vqvae(estimator=None, dtype=torch.float32):
    torch.manual_seed(0)
    codebook = Codebook(16, 4, init="normal", dtype=dtype)
    quantizer = VectorQuantizer(codebook, STE() if estimator is None else estimator, channel_dim=1)
    model = VQVAE(quantizer, width=8, latent_dim=4, downsamplings=1, residual_blocks=1)
    return model.to(DEVICE, dtype)


def adam(model, lr=4e-3):
    codes, rest = split_parameters(model)
    pair = (torch.optim.Adam(parameters, lr=lr) for parameters in (codes, rest))
    return dict(zip(("codebook_optimizer", "model_optimizer"), pair, strict=True))


@pytest.mark.parametrize("name", PROCEDURES)
@pytest.mark.parametrize("estimator", [STE(), DiVeQDetach()])
def test_learns_on_images(name, estimator):
    if name == "closed" and not isinstance(estimator, STE):
        pytest.skip("the closed form is that of STE")
    model = vqvae(estimator)
    procedure = PROCEDURES[name](model, F.mse_loss, **adam(model))
    x = torch.rand(8, 3, 8, 8, device=DEVICE)
    reports = [procedure.step(x) for _ in range(20)]
    assert all(isinstance(report, Step) for report in reports)
    assert reports[-1].indices.shape == (8, 4, 4, 1)
    assert float(reports[-1].task) < 0.8 * float(reports[0].task)


def test_closed_form_on_images():
    """Features that are not the last dimension, convolutions, and the rounding of half precision."""
    model, x = vqvae(dtype=torch.float64), torch.rand(8, 3, 8, 8, dtype=torch.float64, device=DEVICE)
    procedure = MetaQuantization(model, F.mse_loss, **adam(model), xi=0.3)
    (closed,) = procedure.hypergradients(x)[1].values()
    exact = exact_indirect(model, x, 0.3).view_as(closed)
    torch.testing.assert_close(closed, exact, rtol=0, atol=rounding(exact, ops=10_000))


@pytest.mark.parametrize("name", PROCEDURES)
def test_half_precision(name):
    model = vqvae()
    procedure = PROCEDURES[name](model, F.mse_loss, **adam(model))
    x = torch.rand(8, 3, 8, 8, device=DEVICE)
    # one context for all steps: no cast of a parameter may outlive the parameter's change
    with torch.autocast(DEVICE.type, torch.bfloat16):
        reports = [procedure.step(x) for _ in range(20)]
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert float(reports[-1].task) < 0.8 * float(reports[0].task)


def trained(name, batches):
    model = autoencoder()
    procedure = PROCEDURES[name](model, F.mse_loss, **optimizers(model))
    losses = [procedure.step(x).loss for x in batches]
    return snapshot(model) | {"losses": torch.stack(losses)}


def on_rank(rank, batches):
    return {name: trained(name, [x.chunk(2)[rank] for x in batches]) for name in PROCEDURES}


@pytest.mark.skipif(DEVICE.type != "cpu", reason="gloo reduces tensors of the cpu")
def test_two_processes_equal_one():
    batches = [batch(seed) for seed in range(3)]
    found = two_processes(on_rank, batches)
    for name in PROCEDURES:
        expected = trained(name, batches)
        for key, value in expected.items():
            first, second = found[0][name][key], found[1][name][key]
            assert torch.equal(first, second), (name, key)
            # sums in another order; the general form divides what that changes by its displacement, 0.01
            torch.testing.assert_close(first, value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", PROCEDURES)
def test_evaluation_mode_is_refused(name):
    """There the quantizer has no loss and passes no gradient to the encoder: a step would train half a model."""
    model = vqvae()
    procedure = PROCEDURES[name](model, F.mse_loss, **adam(model))
    model.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(
        RuntimeError, match=r"model must be in training mode to step; .* Call model\.train\(\)"
    ):
        procedure.step(torch.rand(2, 3, 8, 8, device=DEVICE))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", PROCEDURES)
def test_codes_alone_can_be_trained(name):
    model = vqvae()
    model.encoder.requires_grad_(False)
    model.decoder.requires_grad_(False)
    codes, rest = split_parameters(model)
    assert not rest
    pair = {
        "codebook_optimizer": torch.optim.SGD(codes, 0.1),
        "model_optimizer": torch.optim.SGD([torch.zeros(1, device=DEVICE)], 0.1),
    }
    before = model.quantizer.export()
    PROCEDURES[name](model, F.mse_loss, **pair).step(torch.rand(2, 3, 8, 8, device=DEVICE))
    assert not torch.equal(before, model.quantizer.export())


def test_a_model_without_its_parts_is_refused():
    with pytest.raises(
        TypeError, match="split_parameters: model must have a Module as its encoder; got none"
    ):
        split_parameters(torch.nn.Linear(2, 2))
