"""The straight-through family: every backend against float64 autograd of the published formulas."""

import pytest
import torch
from conftest import DTYPES

import vqkernels as vq
from vqkernels import straight_through
from vqkernels.ops.straight_through import (
    ANTIPARALLEL,
    _turned,
    straight_through_backward_op,
    straight_through_op,
)
from vqkernels.testing import DEVICE, LAYOUTS, clusters, strided

# weights of the squared error for x and for the code, share of the upstream gradient for the code
WEIGHTS = {"ste": (0.25, 1.0, 0.0), "synchronized": (0.5, 0.75, 1.5), "only_sync": (0.0, 0.0, 1.0)}
WEIGHT = pytest.mark.parametrize("weights", list(WEIGHTS.values()), ids=list(WEIGHTS))
ROTATION = pytest.mark.parametrize("rotation", [False, True], ids=["identity", "rotation"])
SHAPES = [(1, 2, 1), (3, 5, 4), (17, 3, 7), (129, 40, 130), (70, 9, 64)]


def rotation_of(x, c):
    """rho and R (N, D, D) of DiVeQ eq. 4, as matrices; rho R = 1 for x = 0, and 0 for c = 0."""
    n, d = x.shape
    eye = torch.eye(d, dtype=x.dtype, device=x.device).expand(n, d, d)
    x_norm, c_norm = x.norm(dim=1, keepdim=True), c.norm(dim=1, keepdim=True)
    u, v = x / x_norm, c / c_norm
    size = (u + v).norm(dim=1, keepdim=True)
    r = (u + v) / size
    turn = eye - 2 * r[:, :, None] * r[:, None, :] + 2 * v[:, :, None] * u[:, None, :]
    mirror = eye - 2 * u[:, :, None] * u[:, None, :]
    matrix = torch.where((size > ANTIPARALLEL)[..., None], turn, mirror)
    rho = (c_norm / x_norm)[..., None]
    matrix = torch.where((c_norm == 0)[..., None], 0 * eye, rho * matrix)
    return torch.where((x_norm == 0)[..., None], eye, matrix)


def transcription(x, codes, indices, rotation, weights):
    """z (DiVeQ eq. 4, or straight-through) with Huh's eq. 21, and the losses of DiVeQ eq. 2, for autograd."""
    commitment, codebook_weight, sync = weights
    c = codes[indices]
    z = x + (c - x).detach()
    if rotation:
        matrix = rotation_of(x.detach(), c.detach())
        z = (matrix @ x[..., None])[..., 0]
    z = z + sync * (c - c.detach())
    loss = codebook_weight * (x.detach() - c).square().mean() + commitment * (x - c.detach()).square().mean()
    return z, loss


def case(shape, dtype, layout="contiguous", code_dtype=None):
    n, k, d = shape
    x, codes = clusters(n, k, d)
    indices = torch.arange(n, device=DEVICE) % k
    return strided(x.to(dtype), layout), codes.to(code_dtype or dtype), indices


def differentiate(x, codes, indices, rotation, weights, backend, grad, upstream, **options):
    """z, loss and both gradients of <z, grad> + upstream loss."""
    x, codes = x.detach().requires_grad_(), codes.detach().requires_grad_()
    names = dict(zip(("commitment", "codebook_weight", "sync"), weights, strict=True))
    z, loss = straight_through(
        x, codes, indices.view(x.shape[:-1]), rotation=rotation, backend=backend, **names, **options
    )
    torch.autograd.backward((z, loss), (grad.reshape(z.shape), loss.new_tensor(upstream)))
    return z.detach(), loss.detach(), x.grad, codes.grad


def check(x, codes, indices, rotation, weights, backend, grad=None):
    """Values and gradients within the roundings of their arithmetic."""
    n, d = indices.numel(), x.shape[-1]
    grad = torch.randn(n, d, device=DEVICE).to(x.dtype) if grad is None else grad
    given, grad = grad, grad.reshape(n, d)
    # dL/dloss such that the terms of both losses are of the size of the others
    upstream = n * d / 2.0
    z, loss, grad_x, grad_codes = differentiate(
        x, codes, indices, rotation, weights, backend, given, upstream
    )
    assert z.shape == x.shape and z.dtype == grad_x.dtype == x.dtype and grad_codes.dtype == codes.dtype
    flat, table = x.detach().reshape(n, d).double(), codes.detach().double()
    flat, table = flat.requires_grad_(), table.requires_grad_()
    expected_z, expected_loss = transcription(flat, table, indices, rotation, weights)
    ((expected_z * grad.double()).sum() + upstream * expected_loss).backward()

    arithmetic = torch.promote_types(torch.promote_types(x.dtype, codes.dtype), torch.float32)
    eps, store = torch.finfo(arithmetic).eps, torch.finfo(x.dtype).eps
    c = table.detach()[indices]
    assert torch.equal(z.reshape(n, d), c.to(x.dtype))
    assert loss.dtype == arithmetic
    # differences, squares, a sum of d terms, and a few products
    assert (loss.double() - expected_loss).abs() <= (d + 8) * eps * expected_loss + torch.finfo(
        arithmetic
    ).tiny

    commitment, codebook_weight, sync = weights
    g, e = grad.double(), (flat.detach() - c)
    size = g.norm(dim=1, keepdim=True).expand(n, d)
    bound = g.abs() * eps
    if rotation:
        x_norm, c_norm = (t.norm(dim=1, keepdim=True) for t in (flat.detach(), c))
        s = (flat.detach() / x_norm + c / c_norm).norm(dim=1, keepdim=True)
        # of dot products of d terms, beside a direction s that has lost 1/|s| of its digits
        lost = torch.where(s > ANTIPARALLEL, 8 / s, 8).nan_to_num(nan=8.0)
        rho = torch.where(x_norm > 0, c_norm / x_norm, 1)
        size = rho * size
        bound = size * (d + 16) * eps * (1 + lost)
    # the strength of the loss is itself some products
    bound = bound + 8 * eps * commitment * e.abs()
    bound = bound + store * (flat.grad.abs() + bound)
    assert ((grad_x.reshape(n, d).double() - flat.grad).abs() <= bound).all()

    rows = torch.bincount(indices).max()
    terms = codebook_weight * e.abs() + sync * g.abs()
    total = torch.zeros_like(table).index_add_(0, indices, terms)
    bound = (rows + 8) * eps * total + torch.finfo(codes.dtype).eps * table.grad.abs()
    # what is below the smallest number of the dtype
    bound = bound + torch.finfo(codes.dtype).smallest_normal * store
    assert ((grad_codes.double() - table.grad).abs() <= bound).all()


@ROTATION
@WEIGHT
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_autograd(shape, dtype, rotation, weights, backend, need):
    need("straight_through", dtype)
    check(*case(shape, dtype), rotation, weights, backend)


@ROTATION
@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("d", [10, 32])
def test_layouts(layout, d, rotation, backend, need):
    need("straight_through", torch.float32)
    weights = WEIGHTS["synchronized"]
    x, codes, indices = case((60, 9, d), torch.float32, layout)
    check(x, codes, indices, rotation, weights, backend)
    # the gradient's layout is its own
    for other in LAYOUTS:
        grad = strided(torch.randn(60, d, device=DEVICE), other)
        check(x.reshape(grad.shape), codes.t().contiguous().t(), indices, rotation, weights, backend, grad)


@ROTATION
@pytest.mark.parametrize(
    "pair",
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float16),
        (torch.float32, torch.float64),
        (torch.float64, torch.float32),
    ],
    ids=str,
)
def test_mixed_dtypes(pair, rotation, backend, need):
    need("straight_through", *pair)
    for d in (10, 48):
        x, codes, indices = case((33, 9, d), pair[0], code_dtype=pair[1])
        check(x, codes, indices, rotation, WEIGHTS["synchronized"], backend)


def test_rotation_takes_x_to_its_code(backend, need):
    """c.T g = rho R x.g for every g: the transpose of what the backward applies maps x to c."""
    need("straight_through", torch.float32)
    n, d = 30, 6
    x, codes = torch.randn(n, d, device=DEVICE), torch.randn(n, d, device=DEVICE)
    columns = []
    for k in range(d):
        leaf = x.clone().requires_grad_()
        z, _ = straight_through(
            leaf, codes, torch.arange(n, device=DEVICE), rotation=True, commitment=0.0, backend=backend
        )
        unit = torch.zeros(n, d, device=DEVICE)
        unit[:, k] = 1
        z.backward(unit)
        columns.append(leaf.grad.double())
    # row k of rho R
    matrix = torch.stack(columns, 1)
    found = (matrix @ x.double()[..., None])[..., 0]
    c_norm = codes.double().norm(dim=1, keepdim=True)
    s = (x / x.norm(dim=1, keepdim=True) + codes / codes.norm(dim=1, keepdim=True)).norm(dim=1, keepdim=True)
    bound = d**0.5 * (d + 16) * torch.finfo(torch.float32).eps * (1 + 8 / s) * c_norm
    assert ((found - codes).norm(dim=1, keepdim=True) <= bound).all()
    # it keeps lengths up to rho
    rho = c_norm / x.double().norm(dim=1, keepdim=True)
    product = matrix @ matrix.mT / (rho**2)[..., None]
    assert ((product - torch.eye(d, device=DEVICE)).abs() <= 2 * (bound / c_norm)[..., None]).all()


def test_sum_of_squares(backend, need):
    """sq_dist is that of float64 to some roundings, and totals are its sum and the number of rows."""
    need("straight_through", torch.float32)
    x, codes, indices = case((200, 9, 100), torch.float32)
    _, sq_dist, totals = straight_through_op(x[None], codes, indices[None], backend=backend)
    expected = (x.double() - codes[indices].double()).square().sum(1)
    assert ((sq_dist[0].double() - expected).abs() <= 16 * 2.0**-23 * expected).all()
    assert totals.dtype == torch.float64 and totals[1] == 200
    assert (totals[0] - expected.sum()).abs() <= 16 * 2.0**-23 * expected.sum()


def test_squares_out_of_the_range_of_float32(backend, need):
    """Their mean may be in it, and zero times them is zero."""
    need("straight_through", torch.float32)
    if backend == "triton":
        pytest.skip("its squares are float32 numbers")
    x, codes = torch.full((3, 64), 4e18, device=DEVICE), torch.full((2, 64), -4e18, device=DEVICE)
    indices = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    loss = straight_through(x, codes, indices, commitment=1, codebook_weight=0, backend=backend).loss
    torch.testing.assert_close(loss.double(), torch.tensor(6.4e37, device=DEVICE).double(), rtol=1e-5, atol=0)
    far = straight_through(1e2 * x, codes, indices, commitment=0, codebook_weight=0, backend=backend).loss
    assert far == 0


@ROTATION
def test_mean_rows(rotation, backend, need):
    """The number of rows is the caller's: two ranks with masks that share it add up to the whole."""
    need("straight_through", torch.float32)
    x, codes, indices = case((40, 9, 10), torch.float32)
    indices[:7] = -1
    grad, weights = torch.randn(40, 10, device=DEVICE), WEIGHTS["ste"]
    whole = differentiate(x, codes, indices, rotation, weights, backend, grad, 3.0)
    rows = torch.tensor(33, device=DEVICE)
    parts = [
        differentiate(x[p], codes, indices[p], rotation, weights, backend, grad[p], 3.0, mean_rows=rows)
        for p in (slice(0, 20), slice(20, 40))
    ]
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(parts[0][1] + parts[1][1], whole[1], rtol=32 * eps, atol=0)
    torch.testing.assert_close(torch.cat([p[2] for p in parts]), whole[2], rtol=8 * eps, atol=8 * eps)
    torch.testing.assert_close(parts[0][3] + parts[1][3], whole[3], rtol=0, atol=32 * eps)


@ROTATION
@pytest.mark.parametrize("needed", ["x", "codebook", "loss", "z"])
def test_only_what_is_needed(needed, rotation, backend, need):
    """A gradient that is not asked for is not made, and one that is does not depend on the others."""
    need("straight_through", torch.float32)
    x, codes, indices = case((40, 9, 10), torch.float32)
    indices[3], x[4, 2] = -1, torch.nan
    grad = torch.randn(40, 10, device=DEVICE)
    whole = differentiate(x, codes, indices, rotation, WEIGHTS["synchronized"], backend, grad, 9.0)
    a, b = x.clone().requires_grad_(needed != "codebook"), codes.clone().requires_grad_(needed != "x")
    z, loss = straight_through(
        a, b, indices, rotation=rotation, commitment=0.5, codebook_weight=0.75, sync=1.5, backend=backend
    )
    if needed in ("x", "codebook"):
        torch.autograd.backward((z, loss), (grad, loss.new_tensor(9.0)))
        assert torch.equal((a if needed == "x" else b).grad, whole[2 if needed == "x" else 3]) or (
            needed == "x" and torch.equal(a.grad.nan_to_num(7.0), whole[2].nan_to_num(7.0))
        )
        assert (b if needed == "x" else a).grad is None
        return
    (loss if needed == "loss" else z).backward(loss.new_tensor(9.0) if needed == "loss" else grad)
    other = differentiate(
        x,
        codes,
        indices,
        rotation,
        WEIGHTS["synchronized"],
        backend,
        grad * (needed == "z"),
        9.0 * (needed == "loss"),
    )
    assert torch.equal(a.grad.nan_to_num(7.0), other[2].nan_to_num(7.0)) and torch.equal(b.grad, other[3])


def test_the_loss_alone_is_differentiable_twice_no_more(backend, need):
    need("straight_through", torch.float32)
    x, codes, indices = case((4, 3, 5), torch.float32)
    x = x.requires_grad_()
    z, loss = straight_through(x, codes, indices, backend=backend)
    (g,) = torch.autograd.grad(z.square().sum() + loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()


@ROTATION
@WEIGHT
@pytest.mark.parametrize("layout", ["contiguous", "channels"])
@pytest.mark.parametrize("shape", [(5000, 40, 48), (2500, 3000, 32), (3000, 70, 5)], ids=str)
def test_threads(shape, layout, rotation, weights, backend, need):
    """Bits do not depend on the number of threads."""
    need("straight_through", torch.float32)
    if backend != "native" or DEVICE.type != "cpu":
        pytest.skip("only the compiled CPU backend has threads of its own")
    x, codes, indices = case(shape, torch.float32, layout)
    grad = torch.randn(shape[0], shape[2])
    indices[::11], x[(-1,) * x.dim()] = -1, torch.nan
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            args = (x, codes, indices, rotation, weights, backend, grad, 1000.0)
            found.append([t.nan_to_num(nan=-7.0) for t in differentiate(*args)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@ROTATION
def test_atomics(rotation, backend, need):
    """Without torch's deterministic mode a backend may add in any order."""
    need("straight_through", torch.float32)
    torch.use_deterministic_algorithms(False)
    check(*case((129, 9, 10), torch.float32), rotation, WEIGHTS["synchronized"], backend)


@WEIGHT
def test_reference_by_finite_differences(weights):
    """The backward of the reference is the derivative of the formulas, rho R held (float64)."""
    x, codes, indices = case((5, 6, 4), torch.float64)
    matrix = rotation_of(x, codes[indices])
    commitment, codebook_weight, sync = weights
    held, held_codes = x.clone(), codes.clone()

    def surrogate(x, codes):
        z = (matrix @ x[..., None])[..., 0] + sync * (codes - held_codes)[indices]
        fixed = (held - codes[indices]).square().mean(), (x - held_codes[indices]).square().mean()
        return z, codebook_weight * fixed[0] + commitment * fixed[1]

    leaves = x.clone().requires_grad_(), codes.clone().requires_grad_()
    assert torch.autograd.gradcheck(surrogate, leaves)
    grad = torch.randn_like(x)
    z, loss = surrogate(*leaves)
    expected = torch.autograd.grad((z * grad).sum() + 3 * loss, leaves)
    pull = torch.tensor(2 * 3 / x.numel(), dtype=torch.float64, device=DEVICE)
    found = straight_through_backward_op(
        grad[None], pull, x[None], codes, indices[None], True, *weights, True, True, backend="reference"
    )
    torch.testing.assert_close(found[0][0], expected[0], rtol=0, atol=1e-13)
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-13)


def test_reference_rotation_is_the_matrix():
    x, c, g = (torch.randn(50, 7, dtype=torch.float64, device=DEVICE) for _ in range(3))
    expected = (rotation_of(x, c).mT @ g[..., None])[..., 0]
    torch.testing.assert_close(_turned(g, x, c), expected, rtol=0, atol=1e-12)


@ROTATION
def test_compiles_as_one_graph(rotation, backend, need):
    need("straight_through", torch.float32)
    torch._dynamo.reset()
    x, codes, indices = case((60, 9, 7), torch.float32)
    x, codes = x.requires_grad_(), codes.requires_grad_()

    def run(x, codes):
        z, loss = straight_through(x, codes, indices, rotation=rotation, sync=0.5)
        return z.square().sum() + loss

    with vq.use_backend(backend):
        expected = torch.autograd.grad(run(x, codes), (x, codes))
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        found = torch.autograd.grad(compiled(x, codes), (x, codes))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"indices": torch.zeros(4)}, TypeError, "indices must be an int64 tensor"),
        ({"rotation": 1}, TypeError, "rotation must be True or False"),
        ({"commitment": -1.0}, ValueError, "commitment must be not negative and finite"),
        ({"sync": "a"}, TypeError, "sync must be a number"),
        ({"mean_rows": 3}, TypeError, "mean_rows must be a 0-d tensor"),
        ({"mean_rows": torch.ones(2)}, ValueError, "mean_rows must be a 0-d tensor"),
    ],
    ids=lambda value: str(value)[:12],
)
def test_errors(change, error, words):
    given = {
        "x": torch.randn(4, 3),
        "codebook": torch.randn(5, 3),
        "indices": torch.zeros(4).long(),
        **change,
    }
    given = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    with pytest.raises(error, match=rf"straight_through: {words}"):
        straight_through(given.pop("x"), given.pop("codebook"), given.pop("indices"), **given)
