"""Every number of `vqkernels.nn.metrics` against a few lines of float64 that spell out its equation."""

import math

import pytest
import torch

from vqkernels.nn import build, metrics
from vqkernels.nn.gradient_gap import loss_gradient_gap, unquantized
from vqkernels.testing import DEVICE, brute_force

N, D, K = 50, 6, 9
EPS = torch.finfo(torch.float32).eps


def close(found, expected, steps=1):
    """Equal but for `steps` roundings to float32, of all numbers that went into a result."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(found.double().cpu(), expected.cpu(), rtol=steps * EPS, atol=0, equal_nan=True)


def batch(dtype=torch.float32):
    """Latents, codes, indices and z: row 0 is not finite, row 1 masked, code K - 1 beyond everybody's reach."""
    x, codes = torch.randn(N, D, device=DEVICE, dtype=dtype), torch.randn(K, D, device=DEVICE, dtype=dtype)
    codes[-1] = 1e3
    x[0, 2] = torch.nan
    indices, _ = brute_force(x, codes)
    indices[1] = -1
    z = codes[indices.clamp_min(0)]
    z[0], z[1] = torch.nan, 0
    return x, codes, indices, z


def entropy(counts):
    """In nats."""
    p = [c / sum(counts) for c in counts]
    return -sum(q * math.log(q) for q in p if q)


COUNTS = [[1, 2, 0, 1], [5, 0, 0, 0], [3, 3, 3, 3], [1, 10**9, 7, 0]]


def test_code_counts():
    indices = torch.tensor([[0, 1], [1, 3], [-1, 9]], device=DEVICE)
    assert metrics.code_counts(indices, 4).tolist() == [1, 2, 0, 1]
    assert metrics.code_counts(indices, 4, per_stage=True).tolist() == [[1, 1, 0, 0], [0, 1, 0, 1]]
    assert metrics.code_counts(indices[:0], 4).tolist() == [0] * 4
    assert metrics.code_counts(indices[:0], 4, per_stage=True).tolist() == [[0] * 4] * 2
    assert metrics.code_counts(indices[0, 1], 4).tolist() == [0, 1, 0, 0]
    assert metrics.code_counts(indices.t()[:, 1:], 4, per_stage=True).tolist() == [[0, 1, 0, 1], [0] * 4]


def test_of_counts():
    """Whatever is told of counts is told of each row of them."""
    for row, counts in enumerate(COUNTS):
        for made in (torch.tensor(counts, device=DEVICE), torch.tensor(COUNTS, device=DEVICE)):
            picked = (lambda value: value) if made.dim() == 1 else (lambda value, row=row: value[row])
            close(picked(metrics.perplexity(made)), math.exp(entropy(counts)))
            close(picked(metrics.entropy_bits(made)), entropy(counts) / math.log(2))
            close(picked(metrics.usage(made)), sum(c > 0 for c in counts) / 4)
            assert picked(metrics.dead_codes(made)) == counts.count(0)
    counts = torch.tensor(COUNTS, device=DEVICE)
    close(metrics.perplexity(counts), 2 ** metrics.entropy_bits(counts).double(), 4)
    close(metrics.bits_per_latent(counts), sum(map(entropy, COUNTS)) / math.log(2), 5)
    assert metrics.perplexity(counts)[1] == 1 and metrics.entropy_bits(counts)[1] == 0


def test_no_counts():
    none = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    assert metrics.perplexity(none).isnan() and metrics.entropy_bits(none).isnan()
    assert metrics.usage(none) == 0 and metrics.dead_codes(none) == 3
    one = torch.ones(1, dtype=torch.int64, device=DEVICE)
    assert metrics.perplexity(one) == 1 and metrics.usage(one) == 1 and metrics.dead_codes(one) == 0


def test_rates():
    counts = torch.tensor([4, 4], device=DEVICE)
    assert metrics.bits_per_latent(counts) == 1
    assert metrics.bits_per_pixel(10.0, latents=64, pixels=1024) == 0.625
    assert metrics.bits_per_pixel(metrics.bits_per_latent(counts), latents=1, pixels=4) == 0.25


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_distortion(dtype):
    x, _, indices, z = batch(dtype)
    rows = [n for n in range(N) if n > 1]
    expected = (x.double() - z.double()).square().sum(1)[rows].sum() / len(rows)
    found = metrics.distortion(x, z, indices)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    # the difference and the result are rounded, the sum of squares hardly
    close(found, expected, 3)
    # without indices the masked row counts, whose z is 0
    masked = (x[1].double().square().sum() + expected * len(rows)) / (len(rows) + 1)
    close(metrics.distortion(x, z), masked, 3)
    # latents of any layout
    images = [t[:48].view(2, 4, 6, D).movedim(-1, 1) for t in (x, z)]
    found = metrics.distortion(*images, indices[:48].view(2, 4, 6, 1), channel_dim=1)
    close(found, metrics.distortion(x[:48], z[:48], indices[:48]).double())


def test_distortion_of_nothing():
    x, _, indices, z = batch()
    assert metrics.distortion(x[:1], z[:1]).isnan() and metrics.distortion(x[:0], z[:0]).isnan()
    assert metrics.distortion(x, z, torch.full_like(indices, -1)).isnan()
    # what a quantizer broke shows
    z[7] = torch.nan
    assert metrics.distortion(x, z, indices).isnan()
    # a latent of several codes is there as long as one of them is
    dropped = torch.stack((indices, torch.full_like(indices, -1)), -1)
    x, _, indices, z = batch()
    assert metrics.distortion(x, z, dropped) == metrics.distortion(x, z, dropped[:, 0])


def test_distortion_per_bit():
    x, _, indices, z = batch()
    found, counts = metrics.distortion(x, z, indices), metrics.code_counts(indices[2:], K)
    bits = entropy(counts.tolist()) / math.log(2)
    close(metrics.distortion_per_bit(found, counts), found.double() / bits, 3)
    # stages add up
    close(metrics.distortion_per_bit(found, torch.stack((counts, counts))), found.double() / (2 * bits), 4)
    one = torch.tensor([0, 7, 0], device=DEVICE)
    assert metrics.distortion_per_bit(found, one) == torch.inf
    assert metrics.distortion_per_bit(torch.zeros_like(found), one) == torch.inf
    assert metrics.distortion_per_bit(found, torch.zeros_like(one)).isnan()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_divergence(dtype):
    x, codes, indices, _ = batch(dtype)
    _, sq_dist = brute_force(x, codes)
    found = metrics.divergence(x, codes, indices)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    # each distance comes in float32
    close(found, sq_dist[2:].mean(), 2)
    close(metrics.divergence(x, codes), sq_dist[1:].mean(), 2)
    rows = x[:48].view(2, 24, D).movedim(-1, 1)
    close(metrics.divergence(rows, codes, channel_dim=1), sq_dist[1:48].mean(), 2)
    assert metrics.divergence(x[:1], codes).isnan()
    # how far codes are from those in use
    used = metrics.code_counts(indices[2:], K) > 0
    assert 1 < used.sum() < K
    in_use = torch.where(used[:, None], codes, torch.nan)
    close(metrics.divergence(codes, in_use), brute_force(codes, codes[used])[1].mean(), 2)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float32])
def test_psnr(dtype):
    image = torch.rand(3, 2, 5, 4, device=DEVICE).mul(255).to(dtype)
    other = torch.rand(3, 2, 5, 4, device=DEVICE).mul(255).to(dtype)
    other[1] = image[1]
    error = (image.double() - other.double()).square()
    # the error of a logarithm is absolute: that of its argument
    for dim in (None, (1, 2, 3), 0):
        mse = error.mean() if dim is None else error.mean(dim)
        expected = 20 * math.log10(255) - 10 * mse.log10()
        found = metrics.psnr(other, image, data_range=255, dim=dim)
        bound = EPS * (found.abs().nan_to_num(posinf=0).amax() + 10)
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=bound.item())
    assert metrics.psnr(image, image, data_range=255) == torch.inf


def test_gradient_gap_of_lists():
    ours = [torch.randn(3, 4, device=DEVICE), None, torch.randn(2, device=DEVICE), None]
    theirs = [torch.randn(3, 4, device=DEVICE), torch.randn(5, device=DEVICE), None, None]
    expected = (
        (ours[0].double() - theirs[0].double()).square().sum()
        + theirs[1].double().square().sum()
        + ours[2].double().square().sum()
    )
    close(metrics.gradient_gap(ours, theirs), expected, 3)
    assert metrics.gradient_gap(ours, ours) == 0
    # a square that float32 does not hold
    assert metrics.gradient_gap([torch.full((1,), 1e-15)], [torch.full((1,), 0.0)]) > 0


def test_of_a_quantizer():
    """What a quantizer marks as masked or not finite is what these leave out."""
    quantizer, x = build("diveq", dim=D, num_codes=K).to(DEVICE), batch()[0]
    mask = torch.arange(N, device=DEVICE) != 1
    q, rows = quantizer(x, mask), slice(2, None)
    counts = metrics.code_counts(metrics.used_indices(q.indices, x), K)
    assert counts.equal(metrics.code_counts(q.indices[rows], K)) and counts.sum() == N - 2
    close(metrics.distortion(x, q.z, q.indices), (x - q.z)[rows].double().square().sum(1).mean(), 3)
    found = metrics.divergence(x, quantizer.export(), q.indices)
    close(found, brute_force(x[rows], quantizer.export())[1].mean(), 2)


def test_used_rows():
    x, _, indices, _ = batch()
    assert metrics.used_rows(x).tolist() == [False, *[True] * (N - 1)]
    assert metrics.used_rows(x, indices).tolist() == [False, False, *[True] * (N - 2)]
    # the greatest numbers are finite, in every dtype
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        rows = torch.full((4, D), torch.finfo(dtype).max, dtype=dtype, device=DEVICE)
        rows[1, 3], rows[2, 0], rows[3, 1] = torch.inf, -torch.inf, torch.nan
        assert metrics.used_rows(rows).tolist() == [True, False, False, False]
    both = torch.stack((indices, indices), -1)
    assert metrics.used_indices(both, x)[:2].eq(-1).all()
    assert metrics.used_indices(both, x)[2:].equal(both[2:])
    assert metrics.used_indices(indices, x)[2:].equal(indices[2:])


def linear(name="ste", **options):
    """A linear encoder and decoder around a quantizer, its codes near the latents, and a batch."""
    torch.manual_seed(3)
    encoder, decoder = torch.nn.Linear(4, D, bias=False), torch.nn.Linear(D, 3, bias=False)
    quantizer = build(name, dim=D, num_codes=K, **options)
    quantizer.codebook.assign(torch.randn(K, D))
    return torch.nn.ModuleList([encoder, quantizer, decoder]).double(), torch.randn(N, 4), torch.randn(N, 3)


def losses(model, x, target):
    """Half the squared error, with the quantizer and without."""

    def task():
        encoder, quantizer, decoder = model
        return (decoder(quantizer(encoder(x)).z) - target).square().sum() / 2

    with_quantizer = task()
    with unquantized(model[1]):
        return with_quantizer, task()


def test_gradient_gap_of_a_linear_model():
    """Straight through, dL/dA = sum_n B^T (B (A x_n + e_n) - t_n) x_n^T: the gap is |sum_n B^T B e_n x_n^T|^2."""
    model, x, target = linear()
    x, target = x.double(), target.double()
    encoder, quantizer, decoder = model
    before = {key: value.clone() for key, value in quantizer.state_dict().items()}
    loss, reference = losses(model, x, target)
    a, b, codes = encoder.weight.detach(), decoder.weight.detach(), quantizer.export()
    latents = x @ a.t()
    error = codes[brute_force(latents, codes)[0]] - latents
    expected = (b.t() @ b @ error.t() @ x).square().sum()
    close(loss_gradient_gap(loss, reference, encoder.parameters()), expected)
    # the decoder's gap: sum_n r'_n z_n^T - r_n (A x_n)^T with the residuals r
    z = latents + error
    of_decoder = (z @ b.t() - target).t() @ z - (latents @ b.t() - target).t() @ latents
    found = loss_gradient_gap(loss, reference, [encoder.weight, decoder.weight])
    close(found, expected + of_decoder.square().sum())
    # both graphs are still there, nothing was written, and the identity was no forward of the quantizer
    assert encoder.weight.grad is None
    loss.backward()
    assert {
        key: value.tolist() for key, value in quantizer.state_dict().items() if value.is_floating_point()
    } == {key: value.tolist() for key, value in before.items() if value.is_floating_point()}


def test_gradient_gap_of_latents():
    """Eq. 14 itself: the gradient of one forward's latents."""
    model, x, target = linear("diveq_detach")
    encoder, quantizer, decoder = model
    latents = encoder(x.double())
    loss, reference = ((decoder(z) - target).square().sum() for z in (quantizer(latents).z, latents))
    gap = loss_gradient_gap(loss, reference, [latents])
    one, other = (torch.autograd.grad(value, latents)[0] for value in (loss, reference))
    close(gap, (one - other).norm().square())
    assert gap > 0


def test_unquantized():
    quantizer = build("ema", dim=D, num_codes=K, channel_dim=1)
    x = torch.randn(2, D, 3, 4)
    state = {key: value.clone() for key, value in quantizer.state_dict().items()}
    with unquantized(quantizer):
        with unquantized(quantizer):
            assert quantizer(x).z is x
        with pytest.raises(AttributeError), unquantized(quantizer):
            quantizer(None)
        z, indices, loss = quantizer(x)
        assert z is x and indices.shape == (2, 3, 4, 1) and indices.eq(-1).all() and loss == 0
    # no batch was taken note of, and the quantizer is back after an error
    assert all(value.equal(state[key]) for key, value in quantizer.state_dict().items())
    assert "forward" not in vars(quantizer) and quantizer(x).indices.min() >= 0


ON_BATCH = {
    "code_counts": lambda x, c, i, z: metrics.code_counts(i, K),
    "of_counts": lambda x, c, i, z: torch.stack(
        [f(metrics.code_counts(i[:, None], K, per_stage=True)).float() for f in OF_COUNTS]
    ),
    "distortion": lambda x, c, i, z: metrics.distortion(x, z, i),
    "distortion_per_bit": lambda x, c, i, z: metrics.distortion_per_bit(
        metrics.distortion(x, z), metrics.code_counts(metrics.used_indices(i, x), K)
    ),
    "divergence": lambda x, c, i, z: metrics.divergence(x, c, i),
    "gradient_gap": lambda x, c, i, z: metrics.gradient_gap([x[2:], c], [z[2:], None]),
    "psnr": lambda x, c, i, z: metrics.psnr(x[2:], z[2:], data_range=2.0, dim=1),
    "rates": lambda x, c, i, z: metrics.bits_per_pixel(
        metrics.bits_per_latent(metrics.code_counts(i, K)), latents=1, pixels=4
    ),
}
OF_COUNTS = (metrics.perplexity, metrics.usage, metrics.dead_codes, metrics.entropy_bits)


@pytest.mark.parametrize("name", list(ON_BATCH))
def test_no_host_sync(name):
    """The meta device has no values to give, so nothing asks for one."""
    assert ON_BATCH[name](*(t.to("meta") for t in batch())).device.type == "meta"


@pytest.mark.parametrize("name", list(ON_BATCH))
def test_fullgraph(name):
    """In one graph, and the same numbers; no gradient flows."""
    x, codes, indices, z = batch()
    x.requires_grad_()
    compiled = torch.compile(ON_BATCH[name], fullgraph=True, backend="aot_eager")
    found = compiled(x, codes, indices, z)
    torch.testing.assert_close(found, ON_BATCH[name](x, codes, indices, z), rtol=0, atol=0, equal_nan=True)
    assert not found.requires_grad


X, NONE = torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: metrics.code_counts(X, 4), TypeError, "indices must be int64; got torch.float32. Call"),
        (lambda: metrics.code_counts(NONE, 0), ValueError, "num_codes must be at least 1; got 0. Pass"),
        (lambda: metrics.code_counts(NONE[0], 4, per_stage=True), ValueError, "indices must be (..., Q)"),
        (lambda: metrics.distortion(X, X[:2]), ValueError, "z must be of shape (4, 3); got (2, 3). Pass"),
        (
            lambda: metrics.distortion(X, NONE),
            TypeError,
            "z must be float16, bfloat16, float32 or float64; got",
        ),
        (
            lambda: metrics.distortion(X, X, NONE[:3]),
            ValueError,
            "indices must be (4,), then maybe Q, to match x",
        ),
        (
            lambda: metrics.distortion(X, X, channel_dim=2),
            ValueError,
            "x must have features in dimension 2; got shape",
        ),
        (lambda: metrics.divergence(X, X[:, :2]), ValueError, "codebook must be (K, 3) to match x"),
        (lambda: metrics.psnr(X, X, data_range=0), ValueError, "data_range must be positive; got 0. Pass"),
        (lambda: metrics.psnr(X, X[0], data_range=1), ValueError, "image must be of shape (4, 3); got (3,)"),
        (
            lambda: metrics.gradient_gap([X], []),
            ValueError,
            "reference must hold 1 layers as gradients does; got 0",
        ),
        (
            lambda: metrics.gradient_gap([X], [X[0]]),
            ValueError,
            "reference must be of shape (4, 3); got (3,)",
        ),
        (
            lambda: metrics.gradient_gap([None], [None]),
            ValueError,
            "gradients must hold at least one tensor; got",
        ),
        (
            lambda: metrics.bits_per_pixel(1.0, latents=0, pixels=1),
            ValueError,
            "latents must be at least 1; got 0",
        ),
        (
            lambda: loss_gradient_gap(X.sum(), X.sum(), []),
            ValueError,
            "parameters must hold at least one tensor",
        ),
        (
            lambda: loss_gradient_gap(X.sum(), X.sum(), [X]),
            ValueError,
            "parameters must require a gradient; got",
        ),
        (
            lambda: unquantized(torch.nn.Identity()).__enter__(),
            TypeError,
            "quantizers must have a channel_dim; got",
        ),
    ],
)
def test_errors(call, error, words):
    with pytest.raises(error) as caught:
        call()
    assert words in str(caught.value)
