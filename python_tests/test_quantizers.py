"""Every short name keeps one contract, whatever stands behind it."""

import pytest
import torch

from vqkernels.nn import METHODS, Codebook, SFDiVeQ, VectorQuantizer, build
from vqkernels.testing import DEVICE, brute_force

EVERY = pytest.mark.parametrize("name", list(METHODS))
D, K = 6, 16


def make(name, channel_dim=-1, **options):
    """A quantizer with codes that normal latents reach."""
    quantizer = build(name, dim=D, num_codes=K, channel_dim=channel_dim, **options).to(DEVICE)
    spread(quantizer)
    return quantizer


@torch.no_grad()
def spread(quantizer, scale=1.0):
    """Normal codes, the same for the same torch seed, wherever codes can be overwritten."""
    for part in quantizer.modules():
        if isinstance(part, Codebook) and part.assignable:
            part.assign(scale * torch.randn(part.num_codes, part.dim, device=DEVICE))


@EVERY
@pytest.mark.parametrize(
    ("shape", "channel_dim"),
    [((5, D), -1), ((2, D, 3, 4), 1), ((2, 3, D), 2), ((D, 7), 0), ((D,), -1), ((2, D, 2, 2, 3), 1)],
    ids=str,
)
def test_any_layout(name, shape, channel_dim):
    quantizer = make(name, channel_dim)
    x = torch.randn(shape, device=DEVICE, requires_grad=True)
    leading = torch.Size(x.movedim(channel_dim, -1).shape[:-1])
    for mode in (True, False):
        z, indices, loss = quantizer.train(mode)(x)
        assert z.shape == x.shape and z.dtype == x.dtype and z.isfinite().all()
        assert indices.shape == (*leading, quantizer.codes_per_latent)
        assert indices.dtype == torch.int64 and indices.min() >= 0
        assert indices.max() < quantizer.num_indices and loss.shape == ()
    decoded = quantizer.decode(indices)
    assert torch.equal(decoded.movedim(-1, channel_dim).to(z.dtype), z)
    assert torch.equal(quantizer.encode(x), indices) and torch.equal(quantizer.train().encode(x), indices)


@EVERY
def test_gradients_reach_input_and_parameters(name):
    quantizer = make(name)
    x = torch.randn(200, D, device=DEVICE, requires_grad=True)
    z, _, loss = quantizer(x)
    (z.square().sum() + loss).backward()
    assert x.grad.isfinite().all() and x.grad.any()
    for key, parameter in quantizer.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all() and parameter.grad.any(), key


@EVERY
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_half_latents_and_float_codes(name, dtype):
    quantizer = make(name)
    x = torch.randn(30, D, device=DEVICE).to(dtype).requires_grad_()
    z, _, loss = quantizer(x)
    (z.float().square().sum() + loss).backward()
    assert z.dtype == dtype and x.grad.dtype == dtype and loss.dtype in (torch.float32, torch.float64)
    z, indices, _ = quantizer.eval()(x)
    assert quantizer.decode(indices).dtype == torch.float32
    assert torch.equal(quantizer.decode(indices).to(dtype), z)


@EVERY
def test_evaluation_is_deterministic_and_a_float64_search(name):
    quantizer = make(name).eval()
    x = torch.randn(300, D, device=DEVICE)
    z, indices, loss = quantizer(x)
    assert torch.equal(quantizer(x).z, z) and torch.equal(quantizer(x).indices, indices) and loss == 0
    assert quantizer.bits_per_latent == pytest.approx(4 * quantizer.codes_per_latent)
    if isinstance(quantizer, VectorQuantizer):
        with torch.no_grad():
            expected, _ = brute_force(quantizer.inside(x), quantizer.codes())
        assert torch.equal(indices[:, 0], expected) and torch.equal(z, quantizer.export()[expected])


@EVERY
def test_state_dict_round_trip(name):
    first, second = make(name), make(name)
    optimizer = torch.optim.SGD([*first.parameters(), torch.nn.Parameter(torch.zeros(()))], 0.01)
    first.follow(optimizer)
    for _ in range(3):
        x = torch.randn(50, D, device=DEVICE, requires_grad=True)
        z, _, loss = first(x)
        (z.square().mean() + loss).backward()
        optimizer.step()
    second.load_state_dict(first.state_dict())
    assert second.get_extra_state().tolist() == [3, 0]
    assert all(isinstance(value, torch.Tensor) for value in first.state_dict().values())
    torch.manual_seed(5)
    a = first(x)
    torch.manual_seed(5)
    b = second(x)
    assert torch.equal(a.z, b.z) and torch.equal(a.indices, b.indices)
    a, b = first.eval()(x), second.eval()(x)
    assert torch.equal(a.z, b.z) and torch.equal(a.indices, b.indices)
    if isinstance(first, VectorQuantizer):
        plain = VectorQuantizer(Codebook(K, D), SFDiVeQ()).to(DEVICE).eval()
        plain.codebook.assign(first.export())
        assert torch.equal(plain.decode(a.indices), a.z)


@EVERY
def test_rows_that_are_not_finite_or_masked(name):
    """They give NaN, or 0 and -1, and change nothing else: no loss, no code, no other row."""
    x = torch.randn(40, D, device=DEVICE)
    dirty = x.clone()
    dirty[7, 2] = torch.nan
    keep = torch.arange(40, device=DEVICE) != 7
    for mode in (True, False):
        torch.manual_seed(0)
        quantizer = make(name).train(mode)
        state = {key: value.clone() for key, value in quantizer.state_dict().items()}
        results = []
        for rows, mask in ((dirty, None), (dirty, keep), (x, None)):
            quantizer.load_state_dict(state)
            quantizer.zero_grad()
            torch.manual_seed(1)
            rows = rows.clone().requires_grad_()
            z, indices, loss = quantizer(rows, mask)
            (z[keep].square().sum() + loss).backward() if z.requires_grad else None
            grads = [parameter.grad for parameter in quantizer.parameters() if parameter.grad is not None]
            results.append((z, indices, loss, rows.grad, grads))
        bad, masked, whole = results
        assert bad[0][7].isnan().all() and not masked[0][7].any() and (masked[1][7] == -1).all()
        for one in (bad, masked):
            assert one[2].isfinite() and all(grad.isfinite().all() for grad in one[4])
            assert torch.equal(one[0][keep], whole[0][keep]) and torch.equal(one[1][keep], whole[1][keep])
        if mode and whole[3] is not None:
            assert bad[3][7].isnan().all() and not masked[3][7].any()
            # where there is a loss, it is a mean over one row less
            if whole[2] == 0:
                assert torch.equal(bad[3][keep], whole[3][keep])
            assert torch.equal(masked[3][keep], bad[3][keep])
        for a, b in zip(bad[4], masked[4], strict=True):
            torch.testing.assert_close(a, b)
    quantizer = make(name)
    quantizer(dirty)
    quantizer.commit()
    assert all(value.isfinite().all() for value in quantizer.state_dict().values())


@pytest.mark.parametrize("name", ["cosine", "vqgan_fc", "bsq"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_no_direction_no_gradient(name, dtype):
    """A row or code of zeros is not an exploding gradient of x / |x|."""
    quantizer = build(name, dim=3, num_codes=8).to(DEVICE)
    if name != "bsq":
        with torch.no_grad():
            quantizer.codebook.weight[:7] = 0
    x = torch.zeros(5, 3, device=DEVICE, dtype=dtype, requires_grad=True)
    for part in (quantizer.project_in, quantizer.project_out) if name == "vqgan_fc" else ():
        torch.nn.init.zeros_(part.bias)
    z, _, loss = quantizer(x)
    (z.float().sum() + loss).backward()
    assert torch.equal(x.grad, torch.zeros_like(x))
    assert all(p.grad.abs().max() < 100 for p in quantizer.parameters() if p.grad is not None)


@EVERY
def test_loss_is_the_same_without_gradient(name):
    """Also where codes are made by others: the forward of a reentrant checkpoint has no gradient."""
    quantizer = build(name, dim=D, num_codes=16).to(DEVICE)
    x, losses = torch.randn(40, D, device=DEVICE), []
    with quantizer.unobserved():
        for grad in (True, False):
            torch.manual_seed(0)
            with torch.set_grad_enabled(grad):
                losses.append(quantizer(x).loss.detach())
    assert torch.equal(*losses)


@EVERY
def test_padding_is_as_if_it_were_not_there(name):
    """Sequences of different lengths give the indices, values, codes' gradients and loss of their joined rows."""
    quantizer = make(name)
    state = {key: value.clone() for key, value in quantizer.state_dict().items()}
    x = torch.randn(3, 20, D, device=DEVICE)
    mask = torch.arange(20, device=DEVICE) < torch.tensor([20, 3, 11], device=DEVICE)[:, None]
    results = []
    for rows, mask_given in ((torch.where(mask[..., None], x, torch.inf), mask), (x[mask], None)):
        quantizer.load_state_dict(state)
        quantizer.eval()
        evaluated = quantizer(rows, mask_given)
        quantizer.train()
        quantizer.zero_grad()
        torch.manual_seed(3)
        loss = quantizer(rows, mask_given).loss
        if loss.requires_grad:
            loss.backward()
        quantizer.commit()
        results.append((evaluated, loss, quantizer.state_dict()))
    (padded, loss, codes), (joined, other_loss, other_codes) = results
    assert torch.equal(padded.z[mask], joined.z) and torch.equal(padded.indices[mask], joined.indices)
    assert not padded.z[~mask].any() and (padded.indices[~mask] == -1).all()
    if not quantizer.noisy:
        torch.testing.assert_close(loss, other_loss)
    for key, value in codes.items():
        torch.testing.assert_close(value, other_codes[key])
