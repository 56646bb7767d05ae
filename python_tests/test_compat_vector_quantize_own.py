"""`VectorQuantize` where it is to behave otherwise than the peer, and what it owes to all training loops."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from vqkernels.compat.face import UnservedOption
from vqkernels.compat.vector_quantize_pytorch import VectorQuantize

EPS = torch.finfo(torch.float32).eps
N, D, K = 40, 8, 16
OWN = {"learnable_codebook": True, "ema_update": False}


def make(**options):
    torch.manual_seed(0)
    return VectorQuantize(**{"dim": D, "codebook_size": K, **options}), torch.randn(1, N, D)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"threshold_ema_dead_code": 3},
        {**OWN, "threshold_ema_dead_code": 3},
        {"affine_param": True},
        {"heads": 2, "codebook_dim": 4, "separate_codebook_per_head": True},
        {"commitment_use_cross_entropy_loss": True},
        {"codebook_diversity_loss_weight": 1.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("reentrant", [True, False, None])
def test_a_pending_backward_sees_the_codes_of_its_forward(options, reentrant):
    grads, states = [], []
    for way in ("plain", "other"):
        quantizer, x = make(**options)
        x = x.requires_grad_()
        torch.manual_seed(1)
        if way == "plain":
            codes = quantizer._codebook.embed.detach().clone()
            z, _, loss = quantizer(x)
            moved = quantizer._codebook.embed.detach().clone()
            assert not torch.equal(codes, moved)
        elif reentrant is None:
            z, _, loss = quantizer(x)
            with torch.no_grad():
                state = {k: v.clone() for k, v in quantizer.state_dict().items()}
            quantizer(2 * x.detach())
        else:
            z, _, loss = checkpoint(quantizer, x, use_reentrant=reentrant, preserve_rng_state=False)
        ((z * torch.linspace(-1, 1, D)).sum() + loss).backward()
        grads.append([x.grad, *(p.grad for p in quantizer.parameters())])
        states.append(state if way == "other" and reentrant is None else quantizer.state_dict())
    for plain, other in zip(*grads, strict=True):
        # a kept copy and the live codes differ by one subtraction
        assert (plain - other).abs().max() <= 8 * N * EPS * (1 + plain.abs().max())
    # nothing is counted again in a recomputation
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_sync_gives_codes_the_share_of_the_tasks_gradient():
    quantizer, x = make(**OWN, sync_update_v=0.5, commitment_weight=0.0, rotation_trick=False)
    x.requires_grad_()
    z, indices, _ = quantizer(x)
    upstream = torch.randn_like(z)
    z.backward(upstream)
    expected = torch.zeros(K, D).index_add_(0, indices[0], 0.5 * upstream[0])
    assert torch.equal(x.grad, upstream)
    worst = (quantizer._codebook.embed.grad[0] - expected).abs().max()
    assert worst <= N * EPS * upstream.abs().max()


def test_straight_through_needs_nothing_else():
    quantizer, x = make(straight_through=True, stochastic_sample_codes=True)
    z, _, _ = quantizer(x.requires_grad_())
    z.sum().backward()
    assert not quantizer.rotation_trick and torch.equal(x.grad, torch.ones_like(x))
    assert make(directional_reparam=True)[0](x)[0].isfinite().all()


def test_affine_moments_stand_still_in_evaluation_and_load_and_decode():
    quantizer, x = make(affine_param=True)
    for _ in range(2):
        quantizer(3 * x + 5)
    fresh, _ = make(affine_param=True)
    fresh.load_state_dict(quantizer.state_dict())
    for module in (quantizer.eval(), fresh.eval()):
        before = {name: value.clone() for name, value in module.state_dict().items()}
        z, indices, _ = module(x - 7)
        assert torch.equal(module.get_output_from_indices(indices), z)
        assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert torch.equal(fresh(x)[0], quantizer(x)[0])
    # the map takes codes to where rows are
    assert (quantizer.get_codes_from_indices(torch.arange(K)).mean() - 5).abs() < 3


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("cosine", [True, False])
def test_dead_codes_become_rows_that_count_and_no_row_twice(heads, cosine):
    options = {"heads": heads, "separate_codebook_per_head": heads > 1, "codebook_dim": D // heads}
    quantizer, x = make(threshold_ema_dead_code=100, use_cosine_sim=cosine, **options)
    lens = torch.tensor([10])
    before = quantizer._codebook.embed.clone()
    quantizer(x, lens=lens)
    rows = x[0, :10].view(10, heads, -1).transpose(0, 1)
    rows = torch.nn.functional.normalize(rows, dim=-1) if cosine else rows
    apart = torch.cdist(quantizer._codebook.embed, rows)
    taken = apart < 1e-3
    assert before.shape == quantizer._codebook.embed.shape
    # ten rows for sixteen dead codes: each row once, and six codes wait
    assert (taken.sum(1) == 1).all() and (taken.sum(2) <= 1).all()
    assert (quantizer._codebook.cluster_size == 100).sum() == 10 * heads


@pytest.mark.parametrize("cosine", [True, False])
def test_kmeans_starts_the_codes_of_the_first_batch(cosine):
    quantizer, _ = make(kmeans_init=True, use_cosine_sim=cosine)
    middles = 20 * torch.eye(D)
    x = (middles.repeat(N, 1) + 0.01 * torch.randn(N * D, D))[None]
    assert not quantizer._codebook.initted
    _, _, loss = quantizer(x)
    assert quantizer._codebook.initted and loss < 1e-3
    assert quantizer._codebook.cluster_size.sum().isclose(torch.tensor(float(N * D)))
    codes = quantizer.codebook.clone()
    quantizer(x, freeze_codebook=True)
    assert torch.equal(quantizer.codebook, codes)
    few, _ = make(kmeans_init=True)
    with pytest.warns(UserWarning, match="3 rows start 16 codes"):
        few(x[:, :3])


def test_an_optimizer_in_place_sees_its_own_gradient_alone():
    quantizer, x = make(**OWN, in_place_codebook_optimizer=lambda p: torch.optim.SGD(p, lr=4.0))
    codes = quantizer.codebook.detach().clone()
    theirs = torch.full_like(quantizer._codebook.embed, 7.0)
    quantizer._codebook.embed.grad = theirs.clone()
    indices = quantizer.eval()(x)[1]
    quantizer.train()(x)
    chosen = codes.clone().requires_grad_()
    grad = torch.autograd.grad((chosen[indices] - x).square().mean(), chosen)[0]
    assert (quantizer.codebook - (codes - 4 * grad)).abs().max() <= N * EPS * (1 + x.abs().max())
    assert torch.equal(quantizer._codebook.embed.grad, theirs)


def test_a_frozen_codebook_takes_no_gradient():
    quantizer, x = make(**OWN, freeze_codebook=True, route_gradients_to_input=False)
    _, _, loss = quantizer(x.requires_grad_())
    loss.backward()
    assert quantizer._codebook.embed.grad is None and x.grad is not None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_half_and_double_latents_keep_codes_in_float32(dtype):
    quantizer, x = make()
    x = x.to(dtype).requires_grad_()
    codes = quantizer.codebook.clone()
    z, indices, loss = quantizer(x)
    (z.float().sum() + loss).backward()
    assert z.dtype == x.grad.dtype == dtype and quantizer.codebook.dtype == torch.float32
    nearest = torch.cdist(x[0].double(), codes.double()).argmin(1)
    assert torch.equal(indices[0], nearest) and torch.equal(z[0], codes[nearest].to(dtype))


def test_a_row_that_is_not_finite_has_no_part():
    quantizer, x = make()
    other, _ = make()
    bad = x.clone()
    bad[0, 3] = torch.nan
    z, _, loss = quantizer(bad)
    mask = torch.arange(N)[None] != 3
    _, _, expected = other(x, mask=mask)
    assert z[0, 3].isnan().all() and loss == expected
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in quantizer.state_dict().items())


def test_indices_of_shared_heads_decode_to_what_was_returned():
    quantizer, x = make(heads=4, codebook_dim=4)
    z, indices, _ = quantizer.eval()(x)
    assert torch.equal(quantizer.get_output_from_indices(indices), z)


def test_the_codebook_can_be_written():
    quantizer, x = make()
    codes = torch.randn(K, D)
    quantizer.codebook = codes
    assert torch.equal(quantizer.codebook, codes)
    assert torch.equal(quantizer.eval()(x)[0][0], codes[torch.cdist(x[0], codes).argmin(1)])


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"use_cosine_sim": True, **OWN}, "use_cosine_sim"),
        ({"learnable_codebook": True, "ema_update": True}, "ema_update"),
        ({"rotation_trick": True, "directional_reparam": True}, "exclude each other"),
        ({"sync_update_v": 0.5}, "sync_update_v"),
        ({"affine_param": True, "use_cosine_sim": True}, "affine_param"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, word):
    with pytest.raises(ValueError, match=f"VectorQuantize: .*{word}"):
        make(**options)


def test_what_is_not_served_is_refused_by_name():
    with pytest.raises(UnservedOption, match="vq_bridge"):
        make(vq_bridge=torch.nn.Identity())
    quantizer, x = make()
    with pytest.raises(UnservedOption, match="codebook_transform_fn"):
        quantizer(x, codebook_transform_fn=lambda codes: codes)
    with pytest.raises(ValueError, match="lens"):
        quantizer(x, mask=torch.ones(1, N, dtype=torch.bool), lens=torch.tensor([3]))
    with pytest.raises(ValueError, match="mask must"):
        quantizer(x, mask=torch.ones(1, N + 1, dtype=torch.bool))
