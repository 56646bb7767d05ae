"""Meta-Quantization: the hypergradient against its definition, and a step that leaves no other trace."""

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny_autoencoder import (
    DEVICE,
    D,
    K,
    Passes,
    autoencoder,
    batch,
    clear_batch,
    exact_indirect,
    optimizers,
    rounding,
    same,
    snapshot,
)
from torch import nn

from vqkernels.nn import STE, Codebook, DiVeQ, DiVeQDetach, ImportanceReplacement, LatentMeans, TwoPhase
from vqkernels.nn.codebooks import EMACodebook
from vqkernels.train.config import RunError
from vqkernels.train.learners import bilevel
from vqkernels.train.learners.alternated import Alternated
from vqkernels.train.learners.bilevel import MetaQuantization
from vqkernels.train.learners.procedure import Joint, split_parameters

XI = 0.3


def procedure(model, *, kind=torch.optim.SGD, xi=XI, **options):
    return MetaQuantization(model, F.mse_loss, **optimizers(model, kind), xi=xi, **options)


def psi_of(model):
    return split_parameters(model)[0]


def row(gradients):
    return torch.cat([g.flatten() for g in gradients.values()])


def transcribed_loss(model, x):
    """MQ eq. 6 with STE, written out: L_task + alpha L_commit + beta L_codebook; and its indices."""
    estimator = model.quantizer.estimator
    latents, codes = model.encoder(x), model.quantizer.codebook.codes()
    indices = (latents[..., None, :] - codes).square().sum(-1).argmin(-1)
    code = codes[indices]
    if isinstance(estimator, DiVeQDetach):
        # DiVeQ eq. 16: the length of the error has a gradient, its direction has none
        error = code - latents
        z = latents + error.norm(dim=-1, keepdim=True) * (error / error.norm(dim=-1, keepdim=True)).detach()
        return (model.decoder(z) - x).square().mean(), indices
    task = (model.decoder(latents + (code - latents).detach()) - x).square().mean()
    commit = (latents - code.detach()).square().mean()
    codebook = (latents.detach() - code).square().mean()
    return task + estimator.commitment_weight * commit + estimator.codebook_weight * codebook, indices


def transcribed(model, x, displacement=0.01):
    """MQ eq. 14 to 16, line by line, on parameters changed in place: direct, indirect, and all indices met."""
    psi, phi, theta = psi_of(model), list(model.encoder.parameters()), list(model.decoder.parameters())
    start, met = [p.detach().clone() for p in phi + theta], []

    def gradients(values, wanted):
        with torch.no_grad():
            for p, value in zip(phi + theta, values, strict=True):
                p.copy_(value)
        loss, indices = transcribed_loss(model, x)
        met.append(indices)
        found = torch.autograd.grad(loss, wanted, materialize_grads=True)
        with torch.no_grad():
            for p, value in zip(phi + theta, start, strict=True):
                p.copy_(value)
        return found

    primed = [p - XI * g for p, g in zip(start, gradients(start, phi + theta), strict=True)]
    direct = gradients(primed, psi)
    v = gradients(primed, phi + theta)
    indirect = [torch.zeros_like(p) for p in psi]
    for chosen in (range(len(phi)), range(len(phi), len(start))):
        eps = displacement / torch.stack([v[n].norm() for n in chosen]).norm()
        sides = []
        for sign in (1, -1):
            moved = [p + sign * eps * v[n] if n in chosen else p for n, p in enumerate(start)]
            sides.append(gradients(moved, psi))
        indirect = [i - XI * (up - down) / (2 * eps) for i, up, down in zip(indirect, *sides, strict=True)]
    flat = (torch.cat([g.flatten() for g in found]) for found in (direct, indirect))
    return *flat, met


@pytest.mark.parametrize("estimator", [None, DiVeQDetach()])
@pytest.mark.parametrize("codebook", [None, "plain"])
def test_general_form_is_the_paper_line_by_line(codebook, estimator):
    if codebook is not None:
        codebook = Codebook(K, D, init="normal", dtype=torch.float64)
    model, x = autoencoder(estimator, codebook=codebook), batch()
    direct, indirect, _ = transcribed(model, x)
    found = procedure(model, hypergradient="general").hypergradients(x)
    assert indirect.norm() > 1e-4 * direct.norm()
    # the difference divides what rounding left by the displacement, as long as v
    lost = rounding(direct, indirect)
    torch.testing.assert_close(row(found[0]), direct, rtol=0, atol=lost)
    torch.testing.assert_close(row(found[1]), indirect, rtol=0, atol=lost / 0.01)


def test_closed_form_equals_the_general_one():
    """Latents of a two-layer ReLU encoder are quadratic in its parameters: a central difference is exact."""
    model = autoencoder(activation=nn.ReLU)
    x = clear_batch(model)
    closed = procedure(model, hypergradient="closed").hypergradients(x)
    general = procedure(model, hypergradient="general").hypergradients(x)
    _, _, met = transcribed(model, x)
    # probes cross neither a cell's border nor a kink: all but the forwards at the primed point choose alike
    assert all(torch.equal(met[0], met[n]) for n in (3, 4, 5, 6))
    assert met[0].unique().numel() > 2
    assert closed[0].keys() == general[0].keys() == closed[1].keys() == general[1].keys()
    assert torch.equal(row(closed[0]), row(general[0]))
    lost = rounding(row(closed[0]), row(closed[1])) / 0.01
    torch.testing.assert_close(row(general[1]), row(closed[1]), rtol=0, atol=lost)
    torch.testing.assert_close(row(closed[1]), exact_indirect(model, x, XI), rtol=0, atol=lost)


def test_the_difference_approaches_the_closed_form_as_its_square(monkeypatch):
    """With a smooth encoder, half the displacement leaves a quarter of the error."""
    model = autoencoder()
    x = clear_batch(model)
    exact = exact_indirect(model, x, XI)
    closed = row(procedure(model, hypergradient="closed").hypergradients(x)[1])
    torch.testing.assert_close(closed, exact, rtol=0, atol=rounding(exact))
    errors = []
    for displacement in (0.01, 0.005):
        monkeypatch.setattr(bilevel, "_DISPLACEMENT", displacement)
        general = row(procedure(model, hypergradient="general").hypergradients(x)[1])
        errors.append(float((general - exact).norm()))
    # the next term of the series is a ten-thousandth of this one
    assert 3.9 < errors[0] / errors[1] < 4.1
    assert errors[0] < 1e-3 * float(exact.norm())


@pytest.mark.parametrize("options", [{"metric": "cosine"}, {"dim": D}])
def test_closed_form_with_what_stands_before_the_codes(options):
    """Scaled latents and codes, and layers into the codes' space and back, which belong to the encoder's side."""
    codebook = Codebook(K, 2 if "dim" in options else D, init="normal", dtype=torch.float64)
    model, x = autoencoder(codebook=codebook, **options), batch()
    closed = row(procedure(model, hypergradient="closed").hypergradients(x)[1])
    torch.testing.assert_close(closed, exact_indirect(model, x, XI), rtol=0, atol=rounding(closed))


def test_where_codes_see_the_task_the_general_form_is_the_derivative(monkeypatch):
    """DiVeQ: three displacements and Richardson's rule make an oracle of fourth order."""
    model, x = autoencoder(DiVeQDetach()), batch()
    found = {}
    for displacement in (0.01, 0.005, 0.0025):
        monkeypatch.setattr(bilevel, "_DISPLACEMENT", displacement)
        found[displacement] = row(procedure(model).hypergradients(x)[1])
    coarse, middle, fine = found.values()
    assert coarse.norm() > 1e-3
    limits = (4 * middle - coarse) / 3, (4 * fine - middle) / 3
    # what a fourth-order rule leaves is small against what the second-order one does
    assert float((limits[0] - limits[1]).norm()) < 0.01 * float((coarse - limits[1]).norm())
    assert float((coarse - limits[1]).norm()) < 1e-2 * float(coarse.norm())


def test_noise_is_drawn_alike_in_every_forward_of_a_step():
    """Else the difference of two probes would be that of their noise, divided by the displacement."""
    drop = nn.Dropout(0.5)
    model, x = autoencoder(DiVeQ(noise_std=0.3), between=[drop]), batch()
    kept, seeds = [], []
    drop.register_forward_hook(lambda module, args, output: kept.append(output != 0))
    model.quantizer.estimator.register_forward_pre_hook(lambda module, args: seeds.append(args[2].seed))
    report = procedure(model).step(x)
    assert len(kept) == 7 and all(torch.equal(kept[0], other) for other in kept)
    assert all(torch.equal(seeds[0], other) for other in seeds)
    assert report.indirect_norm < 100 * report.direct_norm
    # and the next step draws anew
    procedure(model).step(x)
    assert not torch.equal(kept[0], kept[-1]) and not torch.equal(seeds[0], seeds[-1])


@pytest.mark.parametrize("form", ["closed", "general"])
def test_a_hypergradient_leaves_no_trace(form):
    between = [nn.BatchNorm1d(5)] if form == "general" else []
    model, x = autoencoder(between=between), batch()
    meta = procedure(model, kind=torch.optim.Adam, hypergradient=form)
    meta.step(x)
    before, draws = snapshot(model), torch.get_rng_state()
    states = copy.deepcopy([meta.codebook_optimizer.state_dict(), meta.model_optimizer.state_dict()])
    places = [p.data_ptr() for p in model.module.parameters()]
    meta.hypergradients(x)
    assert same(before, snapshot(model)) and torch.equal(draws, torch.get_rng_state())
    assert places == [p.data_ptr() for p in model.module.parameters()]
    after = [meta.codebook_optimizer.state_dict(), meta.model_optimizer.state_dict()]
    for old, new in zip(states, after, strict=True):
        for number, moments in old["state"].items():
            assert all(torch.equal(value, new["state"][number][key]) for key, value in moments.items())
    assert all(p.grad is None for p in model.module.parameters())


def test_phi_and_theta_step_from_where_they_were_with_the_new_psi():
    model, x = autoencoder(), batch()
    meta, oracle = procedure(model), autoencoder()
    direct, indirect = meta.hypergradients(x)
    lr = meta.codebook_optimizer.param_groups[0]["lr"]
    seen = []
    model.encoder.register_forward_pre_hook(
        lambda module, args: seen.append([p.detach().clone() for p in module.parameters()])
    )
    report = meta.step(x)
    # the last forward of the encoder is at the very bits the step began with
    assert all(torch.equal(p, q) for p, q in zip(seen[-1], oracle.encoder.parameters(), strict=True))
    with torch.no_grad():
        for p, d, i in zip(psi_of(oracle), direct.values(), indirect.values(), strict=True):
            p -= lr * (d + i)
    loss, _ = transcribed_loss(oracle, x)
    rest = split_parameters(oracle)[1]
    for p, g in zip(rest, torch.autograd.grad(loss, rest), strict=True):
        p.data -= lr * g
    for name, value in snapshot(oracle).items():
        if value.is_floating_point():
            torch.testing.assert_close(snapshot(model)[name], value, rtol=0, atol=rounding(value))
    torch.testing.assert_close(report.loss, loss.detach(), rtol=1e-13, atol=0)
    a, b = row(direct), row(indirect)
    torch.testing.assert_close(report.direct_norm, a.norm())
    torch.testing.assert_close(report.indirect_norm, b.norm())
    torch.testing.assert_close(report.cosine, a @ b / (a.norm() * b.norm()))


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("form", ["auto", "general"])
def test_without_xi_it_is_alternated(kind, form):
    models = autoencoder(), autoencoder()
    first = procedure(models[0], kind=kind, xi=0, hypergradient=form)
    second = Alternated(models[1], F.mse_loss, **optimizers(models[1], kind))
    for seed in range(4):
        found, other = first.step(batch(seed)), second.step(batch(seed))
        torch.testing.assert_close(found.loss, other.loss, rtol=1e-12, atol=0)
        assert found.indirect_norm == 0 and found.cosine == 0 and found.direct_norm > 0
    for name, value in snapshot(models[0]).items():
        # adam divides rounding errors by gradients that may be a thousandth of the largest
        torch.testing.assert_close(snapshot(models[1])[name], value, rtol=1e-9, atol=1e-12)


def test_without_bilevel_it_is_joint():
    model, oracle, x = autoencoder(), autoencoder(), batch()
    report = Joint(model, F.mse_loss, **optimizers(model)).step(x)
    loss, _ = transcribed_loss(oracle, x)
    loss.backward()
    torch.optim.SGD(oracle.module.parameters(), lr=0.05).step()
    for name, value in snapshot(oracle).items():
        if value.is_floating_point():
            torch.testing.assert_close(snapshot(model)[name], value, rtol=0, atol=rounding(value))
    torch.testing.assert_close(report.loss, loss.detach(), rtol=1e-13, atol=0)
    assert model.quantizer.codebook.observed == model.quantizer.codebook.committed == 1


@pytest.mark.parametrize("follows", [None, "codebook_optimizer", "model_optimizer"])
@pytest.mark.parametrize("form", ["closed", "general"])
def test_statistics_count_once_in_a_step(form, follows):
    between = [nn.BatchNorm1d(5)] if form == "general" else []
    model = autoencoder(between=between)
    meta = procedure(model, kind=torch.optim.Adam, hypergradient=form)
    if follows is not None:
        model.quantizer.follow(getattr(meta, follows))
    for steps in (1, 2, 3):
        meta.step(batch())
        assert model.quantizer.codebook.observed == model.quantizer.codebook.committed == steps
        assert model.quantizer.get_extra_state().tolist() == [steps, 0]
        for optimizer in (meta.codebook_optimizer, meta.model_optimizer):
            assert all(state["step"] == steps for state in optimizer.state.values())
        if between:
            assert model.encoder[2].num_batches_tracked == steps


def test_replaced_codes_lose_their_moments():
    """Whoever is followed, the moments of codes are in the codebook's optimizer."""
    codebook = Codebook(K, D, init="normal", dtype=torch.float64)
    upkeep = [ImportanceReplacement(TwoPhase(9, 2, stop_before=0), threshold=0.9)]
    model = autoencoder(codebook=codebook, upkeep=upkeep)
    meta = procedure(model, kind=torch.optim.Adam)
    model.quantizer.follow(meta.model_optimizer)
    meta.step(batch())
    before = model.quantizer.export()
    meta.step(batch())
    moved = (model.quantizer.export() - before).norm(dim=1) > 0.2
    moments = meta.codebook_optimizer.state[codebook.weight]["exp_avg"]
    assert moved.any() and moments[moved].eq(0).all() and moments[~moved].ne(0).any()


@pytest.mark.parametrize(
    ("form", "encoder", "decoder"), [("closed", (4, 3), (3, 3)), ("general", (7, 3), (7, 3))]
)
def test_passes_of_a_step(form, encoder, decoder):
    """Closed: three passes through all, and the encoder's forward derivative. General: four forwards more."""
    model = autoencoder()
    meta = procedure(model, hypergradient=form)
    passes = Passes(model.encoder), Passes(model.decoder)
    meta.step(batch())
    found = [(count.forward, count.backward) for count in passes]
    # no probe goes back through encoder or decoder, for the codes' gradient does not come from there
    assert found == [encoder, decoder]


def test_the_form_is_chosen_by_what_holds():
    reasons = {
        "DiVeQ may pass": autoencoder(DiVeQ()),
        "draws noise in Dropout": autoencoder(between=[nn.Dropout(0.1)]),
        "updates statistics in BatchNorm1d": autoencoder(between=[nn.BatchNorm1d(5)]),
    }
    for words, model in reasons.items():
        assert words in procedure(model).why_not_closed()
        with pytest.raises(ValueError, match=words):
            procedure(model, hypergradient="closed")
        counts = Passes(model.encoder)
        procedure(model).step(batch())
        assert counts.forward == 7
    assert procedure(autoencoder()).why_not_closed() is None
    model = autoencoder(between=[nn.Dropout(0.1)])
    model.encoder.eval()
    assert procedure(model).why_not_closed() is None


@pytest.mark.parametrize("form", ["closed", "general"])
def test_a_loss_that_is_not_finite(form):
    model, x = autoencoder(), batch()
    meta = procedure(model, hypergradient=form)
    before = snapshot(model)
    bad = x.clone()
    bad[0, 0, 0] = torch.nan
    with pytest.raises(RunError, match="MetaQuantization: loss must stay finite; got loss nan"):
        meta.step(bad)
    meta.xi = 1e200
    with pytest.raises(RunError, match=r"must stay finite; got loss (inf|nan)"):
        meta.step(x)
    assert same(before, snapshot(model))


def test_a_warm_up_trains_the_model_alone():
    codebook = Codebook(K, D, init="normal", dtype=torch.float64)
    model = autoencoder(codebook=codebook, upkeep=[LatentMeans(2, latents_per_code=2)])
    meta, codes = procedure(model), model.quantizer.export()
    report = meta.step(batch())
    assert torch.equal(codes, model.quantizer.export()) and report.direct_norm == 0
    meta.step(batch())
    assert model.quantizer.initialized
    assert meta.step(batch()).direct_norm > 0


@pytest.mark.parametrize("frozen", ["encoder", "decoder"])
@pytest.mark.parametrize("form", ["closed", "general"])
def test_a_frozen_half(form, frozen):
    """Without an encoder to train, nothing answers to the codes."""
    model, before = autoencoder(), snapshot(autoencoder())
    getattr(model, frozen).requires_grad_(False)
    report = procedure(model, hypergradient=form).step(batch())
    assert report.direct_norm > 0 and (report.indirect_norm > 0) == (frozen == "decoder")
    moved = {
        name.split(".")[0] for name, value in snapshot(model).items() if not torch.equal(before[name], value)
    }
    assert moved == {"encoder", "quantizer", "decoder"} - {frozen}


def test_what_does_not_fit_is_refused():
    model = autoencoder()
    pair = optimizers(model)
    with pytest.raises(ValueError, match="codebook_optimizer must hold the 5 parameters of the first list"):
        MetaQuantization(
            model,
            F.mse_loss,
            codebook_optimizer=pair["model_optimizer"],
            model_optimizer=pair["codebook_optimizer"],
            xi=0.1,
        )
    averages = autoencoder(STE(codebook_weight=0), codebook=EMACodebook(K, D, dtype=torch.float64))
    with pytest.raises(ValueError, match="model must have a codebook with parameters"):
        MetaQuantization(averages, F.mse_loss, **pair, xi=0.1)
    with pytest.raises(ValueError, match="hypergradient must be one of 'auto', 'closed', 'general'"):
        procedure(model, hypergradient="exact")
    with pytest.raises(ValueError, match="xi must be not negative"):
        procedure(model, xi=-1)
    meta = MetaQuantization(model, lambda y, t: (y - t).square(), **pair, xi=0.1)
    with pytest.raises(ValueError, match="task_loss must return a 0-d tensor"):
        meta.step(batch())


def test_a_target_of_another_kind():
    """A classifier: the decoder's outputs against labels."""
    model, x = autoencoder(), batch()
    labels = torch.randint(0, 4, x.shape[:2], device=DEVICE)
    pair = optimizers(model)
    meta = MetaQuantization(model, lambda y, t: F.cross_entropy(y.movedim(-1, 1), t), **pair, xi=0.1)
    losses = [float(meta.step(x, labels).task) for _ in range(20)]
    assert losses[-1] < losses[0]
