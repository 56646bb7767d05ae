"""The faces of vqtorch against its equations, written out in float64, and against stand-ins for its live layers."""

import copy
import inspect

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from vqkernels.compat import vqtorch
from vqkernels.compat.face import UnservedOption
from vqkernels.compat.vqtorch.nn import (
    AffineTransform,
    GroupVectorQuant,
    ResidualVectorQuant,
    VectorQuant,
    utils,
)
from vqkernels.testing import DEVICE

D, K = 8, 24
EPS = torch.finfo(torch.float64).eps
CLASSES = (VectorQuant, GroupVectorQuant, ResidualVectorQuant)
KINDS = [
    (VectorQuant, {}),
    (GroupVectorQuant, {"groups": 2}),
    (GroupVectorQuant, {"groups": 4, "share": False}),
    (ResidualVectorQuant, {"groups": 2}),
    (ResidualVectorQuant, {"groups": 3, "share": False}),
]
OPTIONS = (
    {},
    {"beta": 0.25},
    {"sync_nu": 2.0},
    {"affine_lr": 3.0},
    {"affine_lr": 3.0, "affine_groups": 2, "sync_nu": 0.5},
)


def made(kind, **options):
    """A face in float64 whose affine map is not the identity."""
    face = kind[0](D, K, **kind[1], **options).to(DEVICE).double()
    if face.affine_lr:
        for parameter in face.affine_transform.parameters():
            nn.init.normal_(parameter, std=0.05)
    return face


def latents(*shape, dtype=torch.float64):
    return torch.randn(*shape, device=DEVICE, dtype=dtype)


def shown(face):
    """The codebook of each group, as eq. 15 has it: a list of (k, width)."""
    books = []
    for group in range(face.groups):
        size = K if face.share else K // face.groups
        first = 0 if face.share else group * size
        book = face.codebook.weight[first : first + size]
        if face.affine_lr:
            s, b = face.affine_transform.scale, face.affine_transform.bias
            parts = book.chunk(len(s))
            book = torch.cat(
                [(1 + face.affine_lr * s[i]) * p + face.affine_lr * b[i] for i, p in enumerate(parts)]
            )
        books.append((book, first))
    return books


def equations(face, z):
    """What the layer shall return, by eq. 21 and the sum of the two squared errors, with torch's own gradient."""
    rows = z.movedim(face.dim, -1)
    books = shown(face)
    residual = isinstance(face, ResidualVectorQuant)
    chosen, distances, values = [], [], []
    total = torch.zeros_like(rows)
    for group, (book, first) in enumerate(books):
        part = rows - total.detach() if residual else rows.chunk(len(books), -1)[group]
        distance = (part.detach()[..., None, :] - book.detach()).square().sum(-1).sqrt()
        least = distance.min(-1)
        distances.append(least.values)
        chosen.append(least.indices + first)
        values.append(book[least.indices])
        if residual:
            total = total + values[-1]
    z_q = total if residual else torch.cat(values, -1)
    error = (1 - face.beta) * (rows - z_q.detach()).square() + face.beta * (rows.detach() - z_q).square()
    loss = error.flatten(1).mean(1)
    out = rows + (z_q - rows).detach() + face.nu * (z_q - z_q.detach())
    loss = loss.mean() if type(face) is VectorQuant else loss
    return out.movedim(-1, face.dim), torch.stack(chosen, -1), torch.stack(distances, -1), loss, z_q


def gradients(face, z, run):
    z = z.clone().requires_grad_()
    face.zero_grad()
    out, loss = run(z)
    weights = torch.linspace(-1, 2, out.numel(), device=DEVICE, dtype=torch.float64).view(out.shape)
    share = torch.linspace(5, 9, loss.numel(), device=DEVICE, dtype=torch.float64).view(loss.shape)
    ((out * weights).sum() + (loss * share).sum()).backward()
    return [z.grad, *(parameter.grad for parameter in face.parameters())]


@pytest.mark.parametrize("dim", [1, -1])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
def test_a_layer_is_its_equations(kind, options, dim, training):
    face = made(kind, dim=dim, **options).train(training)
    z = latents(2, D, 3, 5) if dim == 1 else latents(2, 3, 5, D)
    out, found = face(z=z)
    want, indices, distances, loss, z_q = equations(face, z)
    # a few operations per feature on numbers of order 10
    close = {"rtol": 0, "atol": 100 * D * EPS}
    torch.testing.assert_close(found["q"], indices)
    torch.testing.assert_close(out, want, **close)
    torch.testing.assert_close(found["z_q"].flatten(-2), z_q, **close)
    torch.testing.assert_close(found["z"].flatten(-2), z.movedim(dim, -1), rtol=0, atol=0)
    torch.testing.assert_close(
        found["d"].double(), distances.to(found["d"].dtype).double(), rtol=0, atol=1e-6
    )
    torch.testing.assert_close(found["loss"], loss, **close)
    assert found["perplexity"] is None
    got = gradients(face, z, lambda x: (lambda r: (r[0], r[1]["loss"]))(face(x)))
    expected = gradients(face, z, lambda x: (lambda r: (r[0], r[3]))(equations(face, x)))
    for one, other in zip(got, expected, strict=True):
        # sums over the rows of a code, times lr_scale
        torch.testing.assert_close(one, other, rtol=0, atol=1e4 * D * EPS)
    torch.testing.assert_close(face.sq_dist_of(z, indices).sqrt(), distances, **close)


def test_the_residuals_of_the_stages_are_returned():
    face = made((ResidualVectorQuant, {"groups": 3}))
    z = latents(2, D, 7)
    _, found = face(z)
    codes = face.codebook.weight[found["q"]]
    left = torch.stack([z.movedim(1, -1) - codes[..., :i, :].sum(-2) for i in range(4)], -2)
    torch.testing.assert_close(found["z_res"], left, rtol=0, atol=100 * EPS)
    assert found["z_res"].requires_grad


COMMON = {
    "beta": 0.95,
    "sync_nu": 0.0,
    "affine_lr": 0.0,
    "affine_groups": 1,
    "replace_freq": 0,
    "inplace_optimizer": None,
    "dim": 1,
    "norm": "none",
    "cb_norm": "none",
    "kmeans_init": False,
}


@pytest.mark.parametrize("cls", CLASSES)
def test_keywords_stand_in_the_order_and_with_the_defaults_of_vqtorch(cls):
    found = {name: value.default for name, value in inspect.signature(cls).parameters.items()}
    groups = {} if cls is VectorQuant else {"groups": 1, "share": True}
    more = {"code_vector_size": None} if cls is VectorQuant else {}
    none = inspect.Parameter.empty
    want = {"feature_size": none, "num_codes": none, **groups, **COMMON, **more}
    assert list(found.items()) == list(want.items())


@pytest.mark.parametrize(
    ("cls", "options", "keys"),
    [
        (VectorQuant, {}, {"codebook.weight": (K, D)}),
        (GroupVectorQuant, {"groups": 4}, {"codebook.weight": (K, 2)}),
        (GroupVectorQuant, {"groups": 4, "share": False}, {"codebook.weight": (K, 2)}),
        (ResidualVectorQuant, {"groups": 5, "share": False}, {"codebook.weight": (20, D)}),
        (
            VectorQuant,
            {"affine_lr": 1.0, "affine_groups": 3, "kmeans_init": True, "replace_freq": 7},
            {
                "data_initialized": (1,),
                "_counts": (K,),
                "codebook.weight": (K, D),
                "affine_transform.scale": (3, D),
                "affine_transform.bias": (3, D),
            },
        ),
        (
            GroupVectorQuant,
            {"groups": 2, "affine_lr": 1.0, "norm": "bn"},
            {
                "norm_layer.weight": (D,),
                "norm_layer.bias": (D,),
                "norm_layer.running_mean": (D,),
                "norm_layer.running_var": (D,),
                "norm_layer.num_batches_tracked": (),
                "codebook.weight": (K, 4),
                "affine_transform.scale": (1, 4),
                "affine_transform.bias": (1, 4),
            },
        ),
    ],
)
def test_states_have_the_keys_of_vqtorch(cls, options, keys):
    state = cls(D, K, **options).state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == keys


def test_codes_of_half_precision_latents_far_from_zero_are_the_nearest():
    face = VectorQuant(D, K, dim=-1).to(DEVICE)
    nn.init.normal_(face.codebook.weight, mean=100, std=0.1)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        z = (100 + 0.1 * latents(2, 50, D)).to(dtype)
        z_q, found = face(z)
        exact = (z.double()[..., None, :] - face.codebook.weight.double()).square().sum(-1)
        assert torch.equal(found["q"][..., 0], exact.argmin(-1))
        assert z_q.dtype == torch.float32
        assert torch.equal(z_q, face.codebook.weight[found["q"][..., 0]])


def test_norms_are_those_of_vqtorch():
    z = 30 * latents(2, D, 5, 5)
    one = GroupVectorQuant(D, K, groups=2, norm="l2").to(DEVICE)(z)[1]["z"].norm(dim=-1)
    torch.testing.assert_close(one, torch.ones_like(one))
    short = z.movedim(1, -1).unflatten(-1, (2, -1))
    ten = GroupVectorQuant(D, K, groups=2, norm="l2c").to(DEVICE)(z)[1]["z"]
    length = short.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(ten, short / length * length.clamp(max=10), rtol=0, atol=1e-6)
    usual = VectorQuant(D, K, norm="bn").to(DEVICE).double()(z)[1]["z"].flatten(0, -2)
    torch.testing.assert_close(usual.mean(0), torch.zeros(D, device=DEVICE).double(), rtol=0, atol=1e-12)
    face = VectorQuant(D, K, cb_norm="l2").to(DEVICE)
    nn.init.normal_(face.codebook.weight, std=10)
    before = face.codebook.weight.detach().clone()
    face(z.float())
    length = before.norm(dim=1, keepdim=True)
    assert (length > 10).any()
    torch.testing.assert_close(face.codebook.weight.detach(), before / length * length.clamp(max=10))
    face = VectorQuant(D, K, cb_norm="l2c").to(DEVICE)
    face(z.float())
    torch.testing.assert_close(face.codebook.weight.norm(dim=1), torch.ones(K, device=DEVICE))


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


def test_what_happens_inside_a_forward_reaches_no_pending_gradient_and_counts_once():
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
    face = made(KINDS[0], replace_freq=9)
    x = z.clone().requires_grad_()
    checkpoint(lambda value: face(value)[0], x, use_reentrant=False).sum().backward()
    assert face._counts.min() == 8


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


def test_quantizers_are_left_out_for_a_while():
    model = nn.Sequential(nn.Linear(D, D), VectorQuant(D, K, dim=-1), GroupVectorQuant(D, K, groups=2))
    one, two = vqtorch.get_vq_layers(model)
    assert vqtorch.is_vqn(model)
    assert not vqtorch.is_vq(model[0])
    two.enabled = False
    z = torch.randn(2, 3, D)
    with vqtorch.no_vq(model):
        out, found = one(z)
        assert torch.equal(out, z)
        assert found == {}
    assert one.enabled
    assert not two.enabled
    one.set_requires_grad(False)
    assert not one.requires_grad


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: VectorQuant(D, K, code_vector_size=3), UnservedOption, "code_vector_size"),
        (lambda: AffineTransform(D, use_running_statistics=True), UnservedOption, "use_running_statistics"),
        (lambda: VectorQuant(D, K, beta=1.5), ValueError, "beta"),
        (lambda: VectorQuant(D, K, inplace_optimizer=torch.optim.SGD), ValueError, "beta must be 1"),
        (lambda: VectorQuant(D, K, norm="layer"), ValueError, "norm"),
        (lambda: VectorQuant(D, K, cb_norm="bn"), ValueError, "cb_norm"),
        (lambda: VectorQuant(D, K, replace_freq=1), ValueError, "timeout"),
        (lambda: VectorQuant(D, K, affine_lr=1.0, affine_groups=5), ValueError, "affine_groups"),
        (lambda: GroupVectorQuant(D, K, groups=3), ValueError, "groups"),
        (lambda: VectorQuant(D, K)(torch.zeros(2, D)), ValueError, "3 dimensions"),
        (lambda: VectorQuant(D, K)(torch.zeros(2, 3, D)), ValueError, "8 features at dim 1"),
        (lambda: vqtorch.no_vq([3]), TypeError, "modules"),
    ],
)
def test_what_is_not_served_is_refused_by_name(make, error, words):
    with pytest.raises(error, match=words):
        make()


class ReplaceLRU:
    """A stand-in for the hook of a live layer."""

    rho, timeout, policy = 0.02, 6, "input_random"

    def __call__(self, module, inputs, outputs):
        raise AssertionError


def data_dependent_init_forward_hook(module, inputs, outputs):
    raise AssertionError


class LiveLayer(nn.Module):
    """A stand-in with the attributes of a live layer of vqtorch."""

    enabled = True

    def __init__(self, groups=None, share=True):
        super().__init__()
        self.feature_size, self.num_codes, self.beta, self.nu, self.dim, self.topk = D, K, 1.0, 0.5, -1, 1
        self.norm, self.codebook_norm, self.norm_layer = "bn", None, nn.BatchNorm2d(D)
        self.register_buffer("data_initialized", torch.ones(1))
        self.register_forward_hook(data_dependent_init_forward_hook)
        self.codebook = nn.Embedding(K, D)
        self.inplace_codebook_optimizer = torch.optim.SGD(self.codebook.parameters(), lr=1.0)
        if groups is not None:
            self.groups, self.share = groups, share
            self.codebook = nn.Embedding(K, D // groups)
        self.affine_transform = nn.Module()
        self.affine_transform.scale = nn.Parameter(torch.zeros(2, self.codebook.embedding_dim))
        self.affine_transform.bias = nn.Parameter(torch.zeros(2, self.codebook.embedding_dim))
        self.affine_transform.lr_scale, self.affine_transform.num_groups = 4.0, 2
        self.affine_transform.use_running_statistics = False
        self.register_forward_hook(ReplaceLRU())
        self.register_buffer("_counts", torch.full((K,), 5.0))
        self.seen = []
        self.register_forward_hook(lambda module, inputs, outputs: self.seen.append(outputs[1]["q"]))


@pytest.mark.parametrize("groups", [None, 2])
def test_a_live_layer_hands_over_its_tensors(groups):
    live = LiveLayer(groups)
    cls = VectorQuant if groups is None else GroupVectorQuant
    before = torch.get_rng_state()
    face = cls.adopt(live)
    assert torch.equal(torch.get_rng_state(), before)
    ours, theirs = dict(face.named_parameters()), dict(live.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(ours[key] is theirs[key] for key in ours)
    assert face._counts is live._counts
    assert (face.beta, face.nu, face.affine_lr, face.replace_freq, face.replace_rho) == (
        1.0,
        0.5,
        4.0,
        6,
        0.02,
    )
    optimizer = live.inplace_codebook_optimizer
    assert face.inplace_codebook_optimizer is optimizer
    assert optimizer.param_groups[0]["params"][0] is live.codebook.weight
    # the hooks that were the peer's machinery are gone, the user's stays
    live.dim = face.dim = 1
    codes = live.codebook.weight.detach().clone()
    _, found = face(torch.randn(2, D, 3, 3))
    assert torch.equal(live.seen[0], found["q"])
    assert not torch.equal(live.codebook.weight, codes)


def test_a_live_layer_that_was_changed_by_hand_is_refused():
    for change in (
        lambda live: setattr(live, "topk", 2),
        lambda live: setattr(live.affine_transform, "use_running_statistics", True),
        lambda live: setattr(list(live._forward_hooks.values())[1], "policy", "self"),
    ):
        live = LiveLayer()
        change(live)
        with pytest.raises(UnservedOption):
            VectorQuant.adopt(live)


def test_replacement_can_be_added_later():
    face = utils.lru_replacement(VectorQuant(D, K), rho=0.5, timeout=4)
    assert (face.replace_rho, face.replace_freq, face._counts.tolist()) == (0.5, 4, [4.0] * K)
    codes = face.codebook.weight[:3]
    assert torch.equal(face.get_codebook()[:3], codes)
    assert face.get_codebook_affine_params() is None
    group, first = GroupVectorQuant(D, K, groups=2, share=False).get_codebook_by_group(1)
    assert (group.shape, first) == ((12, 4), 12)
