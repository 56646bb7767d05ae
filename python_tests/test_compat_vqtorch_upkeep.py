"""Codes that the faces of vqtorch start, replace or move inside a forward."""

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from vqtorch_equations import EPS, KINDS, D, K, equations, latents, made, shown

from vqkernels.compat.vqtorch.nn import ResidualVectorQuant, VectorQuant
from vqkernels.testing import DEVICE


@pytest.mark.parametrize("kind", KINDS)
def test_kmeans_starts_the_codes_before_the_first_output(kind):
    face = kind[0](D, K, **kind[1], kmeans_init=True, affine_lr=1.0).to(DEVICE)
    random = copy.deepcopy(face)
    random.data_initialized.fill_(1)
    z = 100 + latents(2, D, 200, dtype=torch.float32)
    face.eval()(z)
    assert face.data_initialized == 0
    before = (random(z)[0] - z).square().mean()
    with torch.no_grad():
        error = (face.train()(z)[0] - z).square().mean()
    assert error < 1 < before
    assert face.data_initialized == 1
    codes = face.codebook.weight.detach().clone()
    face(z + 50)
    assert torch.equal(face.codebook.weight, codes)
    other = kind[0](D, K, **kind[1], kmeans_init=True, affine_lr=1.0).to(DEVICE)
    other.load_state_dict(face.state_dict())
    other(z + 50)
    assert torch.equal(other.codebook.weight, codes)


def test_kmeans_on_too_few_rows_makes_as_many_codes_as_asked_for():
    face = VectorQuant(D, K, kmeans_init=True).to(DEVICE)
    z = latents(1, D, 10, dtype=torch.float32)
    with pytest.warns(UserWarning, match="10 rows for 24 codes"):
        face(z)
    assert face.codebook.weight.shape == (K, D)
    near = torch.cdist(face.codebook.weight.detach(), z[0].t()).amin(1)
    assert near.amax() < 0.01


def unused(face, z):
    """Run until the codes that nobody chose are due, and return which they were and the codes before."""
    for _ in range(face.replace_freq - 1):
        face(z)
    before = face.get_codebook()
    due = face._counts == 1
    return due, before


@pytest.mark.parametrize("kind", KINDS)
def test_codes_that_nobody_chose_become_latents_that_their_codebook_searched(kind):
    face = made(kind, replace_freq=3, affine_lr=2.0)
    z = latents(2, D, 30)
    with torch.no_grad():
        face.codebook.weight[::2] += 1e3
    due, before = unused(face, z)
    _, found = face(z)
    due &= ~torch.zeros_like(due).index_fill(0, found["q"].flatten(), True)
    assert due.any()
    after = face.get_codebook()
    assert torch.equal(after[~due[: len(after)]], before[~due[: len(after)]])
    searched = found["z_res"][..., :-1, :] if "z_res" in found else found["z"]
    for group in range(face.groups):
        mine = due.nonzero()[:, 0]
        mine = mine if face.share else mine[mine // face.group_size == group]
        pool = searched.flatten(0, -2) if face.share else searched[..., group, :].flatten(0, -2)
        if len(mine):
            distance, at = torch.cdist(after[mine], pool.detach()).min(1)
            # noise of a hundredth of the length, six deviations of the largest of its features
            assert (distance < 0.06 * D**0.5 * pool[at].norm(dim=1)).all()
    assert (face._counts[due] == 3).all()


def test_what_happens_inside_a_forward_reaches_no_pending_gradient():
    z = latents(2, D, 10)
    for options in ({"replace_freq": 2}, {"cb_norm": "l2"}, {"replace_freq": 2, "affine_lr": 1.0}):
        face = made(KINDS[0], **options)
        plain = made(KINDS[0], **{key: value for key, value in options.items() if key == "affine_lr"})
        plain.load_state_dict(face.state_dict(), strict=False)
        runs = []
        for layer in (plain, face):
            total = 0
            for _ in range(2):
                out, found = layer(z)
                total = total + found["loss"] + out.square().sum()
            total.backward()
            runs.append(layer.codebook.weight.grad)
        torch.testing.assert_close(*runs, rtol=0, atol=1e-12 if options.get("cb_norm") is None else 1e-7)


def test_a_region_that_runs_again_counts_and_steps_once():
    inner = {"beta": 1.0, "inplace_optimizer": lambda p: torch.optim.SGD(p, lr=1.0)}
    face = made(KINDS[0], replace_freq=9, **inner)
    once = copy.deepcopy(face)
    once.inplace_codebook_optimizer = torch.optim.SGD(once.codebook.parameters(), lr=1.0)
    z = latents(2, D, 10).requires_grad_()
    once(z)
    # without it the region ends, the second time, before it has come to what is tested
    with set_checkpoint_early_stop(False):
        checkpoint(lambda value: face(value)[0], z, use_reentrant=False).sum().backward()
    assert face._counts.min() == 8
    assert torch.equal(face.codebook.weight, once.codebook.weight)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("affine", [0.0, 2.0])
def test_the_inner_optimizer_takes_a_step_before_the_output(kind, affine):
    lr = 3.0
    face = made(kind, beta=1.0, affine_lr=affine, inplace_optimizer=lambda p: torch.optim.SGD(p, lr=lr))
    z = latents(2, D, 9)
    weight = face.codebook.weight
    before = weight.detach().clone()
    _, indices, *_ = equations(face, z)
    books = torch.cat([book for book, _ in (shown(face)[:1] if face.share else shown(face))])
    rows = z.movedim(1, -1)
    chosen = books[indices]
    if kind[0] is ResidualVectorQuant:
        targets = rows[..., None, :] - (chosen.cumsum(-2) - chosen).detach()
    else:
        targets = rows.unflatten(-1, (face.groups, -1))
    grad = torch.autograd.grad((chosen - targets).square().mean(), weight)[0]
    weight.grad = torch.full_like(weight, 7.0)
    out, found = face(z)
    assert torch.equal(found["q"], indices)
    torch.testing.assert_close(weight.detach(), before - lr * grad, rtol=0, atol=100 * D * EPS)
    assert (weight.grad == 7).all()
    moved = torch.cat([book for book, _ in (shown(face)[:1] if face.share else shown(face))])[indices]
    want = moved.sum(-2) if kind[0] is ResidualVectorQuant else moved.flatten(-2)
    torch.testing.assert_close(out.movedim(1, -1), want, rtol=0, atol=100 * D * EPS)
    (out.sum() + found["loss"].sum()).backward()
    face.eval()(z)
    torch.testing.assert_close(weight.detach(), before - lr * grad, rtol=0, atol=100 * D * EPS)


def test_a_compiled_backward_that_is_pending_sees_the_codes_of_its_forward():
    # of what moves codes inside a forward, the norm is compiled the fastest
    face = VectorQuant(D, K, cb_norm="l2c", affine_lr=2.0).to(DEVICE)
    other = copy.deepcopy(face)
    z = latents(2, D, 5, dtype=torch.float32)
    found = []
    # inductor alone takes a copy for its source
    for module, run in ((face, face), (other, torch.compile(other, fullgraph=True))):
        leaf = z.clone().requires_grad_()
        z_q, result = run(leaf)
        with torch.no_grad():
            module.codebook.weight.neg_()
        ((z_q * z_q).sum() + result["loss"]).backward()
        found.append([each.grad for each in (leaf, *module.parameters())])
    torch.testing.assert_close(*found)
    torch._dynamo.reset()
