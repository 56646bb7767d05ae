"""Alternated optimization: what each of its steps descends, and what it leaves alone."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from tiny_autoencoder import B, D, K, Passes, T, autoencoder, batch, optimizers, rounding, same, snapshot

from vqkernels.nn import STE, Codebook, DiVeQ, DiVeQDetach, LatentMeans
from vqkernels.train.config import RunError
from vqkernels.train.learners.alternated import Alternated
from vqkernels.train.learners.procedure import split_parameters

LR = 0.05


def procedure(model, *, kind=torch.optim.SGD, lr=LR, **options):
    return Alternated(model, F.mse_loss, **optimizers(model, kind, lr), **options)


def plain(scale=1.0):
    codebook = Codebook(K, D, init="normal", dtype=torch.float64)
    codebook.assign(codebook.weight * scale)
    return codebook


def nearest(latents, codes):
    return (latents[..., None, :] - codes).square().sum(-1).argmin(-1)


def descend(loss, parameters):
    for p, g in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        p.data -= LR * g


@pytest.mark.parametrize("commitment", [0.4, 0.0])
@pytest.mark.parametrize(("inner", "split"), [(1, False), (3, False), (3, True)])
def test_a_step_is_the_paper_line_by_line(inner, split, commitment):
    """Huh eq. 17 and 18 by plain gradient descent, on a copy; without a commitment, eq. 18 to the letter."""
    estimator = STE(codebook_weight=1.3, commitment_weight=commitment)
    model, oracle, x = autoencoder(estimator), autoencoder(estimator), batch()
    report = procedure(model, inner=inner, split=split).step(x)
    psi, rest = split_parameters(oracle)
    latents, losses = oracle.encoder(x).detach(), []
    for part in latents.tensor_split(inner) if split else [latents] * inner:
        codes = oracle.quantizer.codes()
        distance = (part - codes[nearest(part, codes.detach())]).square().mean()
        # both parts of the quantizer's loss have this value; one of them has a gradient
        losses.append((1.3 + commitment) * distance.detach())
        descend(1.3 * distance, psi)
    latents, codes = oracle.encoder(x), oracle.quantizer.codes().detach()
    code = codes[nearest(latents, codes)]
    task = (oracle.decoder(latents + (code - latents).detach()) - x).square().mean()
    descend(task + commitment * (latents - code).square().mean(), rest)
    for name, value in snapshot(oracle).items():
        if value.is_floating_point():
            torch.testing.assert_close(snapshot(model)[name], value, rtol=0, atol=rounding(value))
    torch.testing.assert_close(report.codebook_losses, torch.stack(losses), rtol=1e-12, atol=0)
    torch.testing.assert_close(report.task, task.detach(), rtol=1e-12, atol=0)
    assert torch.equal(report.indices[..., 0], nearest(latents, codes))


@pytest.mark.parametrize("inner", [1, 2, 4, 8])
def test_codes_descend_their_loss(inner):
    model, x = autoencoder(codebook=plain()), batch()
    alternated = procedure(model, inner=inner, lr=0.5)
    before = model.quantizer(model.encoder(x)).loss
    model.quantizer.commit()
    losses = alternated.step(x).codebook_losses
    assert losses.shape == (inner,) and (losses.diff() < 0).all()
    torch.testing.assert_close(losses[0], before.detach())


def test_assignments_are_new_each_time():
    model, x = autoencoder(codebook=plain(3.0)), batch()
    chosen = []
    model.quantizer.register_forward_hook(lambda module, args, output: chosen.append(output.indices))
    procedure(model, inner=4, lr=3.0).step(x)
    assert len(chosen) == 5 and not any(torch.equal(a, b) for a, b in itertools.pairwise(chosen))


@pytest.mark.parametrize("inner", [1, 8])
def test_one_pass_through_the_model_serves_all(inner):
    model = autoencoder()
    passes = [Passes(model.encoder), Passes(model.decoder)]
    procedure(model, inner=inner).step(batch())
    assert [(count.forward, count.backward) for count in passes] == [(1, 1), (1, 1)]


@pytest.mark.parametrize("follows", [None, "codebook_optimizer", "model_optimizer"])
def test_statistics_count_once_in_a_step(follows):
    model = autoencoder()
    alternated = procedure(model, kind=torch.optim.Adam, inner=3)
    if follows is not None:
        model.quantizer.follow(getattr(alternated, follows))
    for steps in (1, 2, 3):
        alternated.step(batch())
        assert model.quantizer.codebook.observed == model.quantizer.codebook.committed == steps
        assert model.quantizer.get_extra_state().tolist() == [steps, 0]
        moments = alternated.codebook_optimizer.state, alternated.model_optimizer.state
        assert [{int(s["step"]) for s in state.values()} for state in moments] == [{3 * steps}, {steps}]
    assert all(p.grad is None for p in model.module.parameters())


def test_codes_that_see_the_task_step_on_it_with_the_model():
    """DiVeQ has no loss of its own: its codes descend the distance to latents, then the task's loss."""
    model, oracle, x = (
        autoencoder(DiVeQDetach(), codebook=plain()),
        autoencoder(DiVeQDetach(), codebook=plain()),
        batch(),
    )
    oracle.module.load_state_dict(model.module.state_dict())
    procedure(model).step(x)
    psi, rest = split_parameters(oracle)
    latents = oracle.encoder(x).detach()
    code = oracle.quantizer.codes()
    descend((latents - code[nearest(latents, code)]).square().mean(), psi)
    descend(F.mse_loss(oracle.decoder(oracle.quantizer(oracle.encoder(x)).z), x), [*psi, *rest])
    oracle.quantizer.commit()
    for name, value in snapshot(oracle).items():
        torch.testing.assert_close(
            snapshot(model)[name], value, rtol=0, atol=rounding(value) if value.is_floating_point() else 0
        )


def test_every_part_learns_also_where_layers_lead_to_the_codes():
    codebook = Codebook(K, 2, init="normal", dtype=torch.float64)
    model = autoencoder(codebook=codebook, dim=D)
    before = snapshot(model)
    alternated = procedure(model, kind=torch.optim.Adam, lr=1e-2)
    losses = [float(alternated.step(batch()).loss) for _ in range(60)]
    assert losses[-1] < 0.8 * losses[0]
    after = snapshot(model)
    assert all(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("estimator", [None, DiVeQ()])
def test_a_loss_that_is_not_finite(estimator):
    model, x = autoencoder(estimator), batch()
    x[0, 0, 0] = torch.nan
    before = snapshot(model)
    with pytest.raises(RunError, match="Alternated: loss must stay finite; got loss nan"):
        procedure(model, inner=2).step(x)
    after = snapshot(model)
    assert all(torch.equal(before[name], after[name]) for name in before if not name.startswith("quantizer"))
    # rows that are finite have moved the codes; the one that is not has no part in it
    assert all(value.isfinite().all() for value in after.values())


def test_a_warm_up_trains_the_model_alone():
    model = autoencoder(codebook=plain(), upkeep=[LatentMeans(2, latents_per_code=2)])
    alternated, codes = procedure(model, kind=torch.optim.Adam, inner=2), model.quantizer.export()
    assert alternated.step(batch()).codebook_losses.shape == (0,)
    assert torch.equal(codes, model.quantizer.export()) and not alternated.codebook_optimizer.state
    alternated.step(batch())
    assert model.quantizer.initialized
    assert alternated.step(batch()).codebook_losses.shape == (2,)


def test_what_does_not_fit_is_refused():
    model = autoencoder()
    for inner, error in ((0, ValueError), (1.5, TypeError)):
        with pytest.raises(error, match="Alternated: inner must be"):
            procedure(model, inner=inner)
    with pytest.raises(TypeError, match="Alternated: split must be True or False"):
        procedure(model, split=1)
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"batch must have a row for each of {B + 1} parts; got {B}"):
        procedure(model, inner=B + 1, split=True).step(batch())
    assert same(before, snapshot(model))


def test_unobserved_forwards_count_for_nothing():
    quantizer = autoencoder().quantizer
    x = torch.randn(T, D, dtype=torch.float64, device=quantizer.codebook.device)
    with quantizer.unobserved():
        quantizer(x)
    assert quantizer.codebook.observed == 0 and not quantizer.uncommitted
    quantizer(x)
    assert quantizer.codebook.observed == 1 and quantizer.uncommitted
    # a commit that waits goes on waiting
    with quantizer.unobserved():
        quantizer(x)
    assert quantizer.codebook.committed == 0 and quantizer.uncommitted
    with pytest.raises(ValueError, match="stop"), quantizer.unobserved():
        raise ValueError("stop")
    assert quantizer.observing
