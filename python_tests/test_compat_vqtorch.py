"""The faces of vqtorch against its equations, written out in float64."""

import inspect

import pytest
import torch
from torch import nn
from vqtorch_equations import EPS, KINDS, D, K, equations, latents, made

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

CLASSES = (VectorQuant, GroupVectorQuant, ResidualVectorQuant)
OPTIONS = (
    {},
    {"beta": 0.25},
    {"sync_nu": 2.0},
    {"affine_lr": 3.0},
    {"affine_lr": 3.0, "affine_groups": 2, "sync_nu": 0.5},
)


def gradients(face, z, run):
    z = z.clone().requires_grad_()
    face.zero_grad()
    out, loss = run(z)
    weights = torch.linspace(-1, 2, out.numel(), device=DEVICE, dtype=torch.float64).view(out.shape)
    share = torch.linspace(5, 9, loss.numel(), device=DEVICE, dtype=torch.float64).view(loss.shape)
    ((out * weights).sum() + (loss * share).sum()).backward()
    return [z.grad, *(parameter.grad for parameter in face.parameters())]


@pytest.mark.parametrize(("training", "dim"), [(True, 1), (False, -1)])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
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


def test_replacement_can_be_added_later():
    face = utils.lru_replacement(VectorQuant(D, K), rho=0.5, timeout=4)
    assert (face.replace_rho, face.replace_freq, face._counts.tolist()) == (0.5, 4, [4.0] * K)
    codes = face.codebook.weight[:3]
    assert torch.equal(face.get_codebook()[:3], codes)
    assert face.get_codebook_affine_params() is None
    group, first = GroupVectorQuant(D, K, groups=2, share=False).get_codebook_by_group(1)
    assert (group.shape, first) == ((12, 4), 12)
