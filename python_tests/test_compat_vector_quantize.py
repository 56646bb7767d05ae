"""`VectorQuantize` beside the live peer: same weights, same input."""

import pytest
import torch

from vqkernels.compat.vector_quantize_pytorch import VectorQuantize

library = pytest.importorskip("vector_quantize_pytorch")
EPS = torch.finfo(torch.float32).eps
B, N, D, K = 2, 30, 16, 32
LENS = torch.tensor([10, 25])
OWN = {"learnable_codebook": True, "ema_update": False}
TARGETS = torch.arange(B * N).view(B, N) % K

# options, input without batch, arguments of forward; where backward sees all codes they stand still, as the peer's
# backward reads codes that its update has changed
CASES = {
    "plain": ({}, (N, D), {}),
    "ste, channels first": ({"rotation_trick": False, "channel_last": False}, (D, N), {}),
    "image": ({"accept_image_fmap": True}, (D, 5, 6), {}),
    "volume": ({"accept_3d_fmap": True}, (D, 5, 3, 2), {}),
    "one token": ({}, (D,), {}),
    "cosine": ({"use_cosine_sim": True}, (N, D), {}),
    "projected": (
        {"codebook_dim": 4, "layernorm_after_project_in": True, "use_cosine_sim": True},
        (N, D),
        {},
    ),
    "heads": ({"heads": 4, "codebook_dim": 4}, (N, D), {}),
    "separate heads": (
        {"heads": 4, "codebook_dim": 8, "separate_codebook_per_head": True, "accept_image_fmap": True},
        (D, 5, 6),
        {},
    ),
    "learned": (OWN, (N, D), {}),
    "learned, not routed": ({**OWN, "route_gradients_to_input": False}, (N, D), {}),
    "directional": (
        {"directional_reparam": True, "directional_reparam_variance": 1e-20, "threshold_ema_dead_code": 1e-9},
        (N, D),
        {},
    ),
    "orthogonal": (
        {"orthogonal_reg_weight": 3.0, "orthogonal_reg_active_codes_only": True},
        (N, D),
        {},
    ),
    "diversity": (
        {"codebook_diversity_loss_weight": 0.5, "codebook_diversity_temperature": 2.0},
        (N, D),
        {"freeze_codebook": True},
    ),
    "entropy commitment": (
        {
            "commitment_use_cross_entropy_loss": True,
            "heads": 4,
            "codebook_dim": 4,
            "separate_codebook_per_head": True,
        },
        (N, D),
        {"freeze_codebook": True},
    ),
    "soft gradient": (
        {"straight_through": True, "rotation_trick": False, "route_gradients_to_input": False},
        (N, D),
        {"freeze_codebook": True},
    ),
    "lens": ({}, (N, D), {"lens": LENS}),
    "mask over x": (
        {"return_zeros_for_masked_padding": False, "rotation_trick": False},
        (N, D),
        {"mask": torch.arange(N) < LENS[:, None]},
    ),
    "targets": ({}, (N, D), {"indices": TARGETS, "freeze_codebook": True}),
    "topk": ({}, (N, D), {"topk": 3}),
    "affine": ({"affine_param": True}, (N, D), {}),
    "in place": (
        {**OWN, "in_place_codebook_optimizer": lambda p: torch.optim.SGD(p, lr=1.0)},
        (N, D),
        {},
    ),
    "weighted": ({}, (N, D), {"ema_update_weight": torch.linspace(0, 1, K)}),
    "weighted by a function": ({}, (N, D), {"ema_update_weight": lambda sums, counts: (counts > 1).float()}),
    "accumulated": ({"manual_ema_update": True}, (N, D), {"accum_ema_update": True}),
    "no update": ({}, (N, D), {"ema_update": False}),
}


def pair(options):
    torch.manual_seed(0)
    peer = library.VectorQuantize(dim=D, codebook_size=K, **options)
    face = VectorQuantize(dim=D, codebook_size=K, **options)
    face.load_state_dict(peer.state_dict())
    return peer, face


def near(name, got, wanted, terms):
    """Within the rounding of `terms` float32 operations on numbers as large as the largest."""
    if got is None or wanted is None:
        assert got is wanted, name
        return
    assert got.shape == wanted.shape and got.dtype == wanted.dtype, name
    worst = (got - wanted).abs().max().item()
    assert worst <= 4 * terms * EPS * (1 + wanted.abs().max().item()), (name, worst)


def same_choice(face, x, ours, theirs):
    if torch.equal(ours, theirs) or ours.shape[-1] == 3:
        assert torch.equal(ours, theirs)
        return
    gap = face.sq_dist_of(x, theirs) - face.sq_dist_of(x, ours)
    assert (gap[ours != theirs] > 0).all() and (ours != theirs).float().mean() < 0.05


@pytest.mark.parametrize("case", CASES)
def test_as_the_peer(case):
    options, shape, arguments = CASES[case]
    peer, face = pair(options)
    assert list(face.state_dict()) == list(peer.state_dict())
    for step in range(2):
        x = torch.randn(B, *shape)
        results = []
        for module in (peer, face):
            module.zero_grad()
            latents = x.clone().requires_grad_()
            torch.manual_seed(step)
            returned = module(latents, **arguments)
            # a fixed weight for each number, so that the gradient is no constant
            weight = torch.linspace(-1, 1, returned[0].numel()).view(returned[0].shape)
            ((returned[0] * weight).sum() + 3 * returned[-1].sum()).backward()
            results.append((returned, latents.grad, {k: p.grad for k, p in module.named_parameters()}))
        (theirs, their_grad, their_grads), (ours, our_grad, our_grads) = results
        near("quantized", ours[0], theirs[0], D * (step + 1))
        near("loss", ours[-1], theirs[-1], B * N)
        if "indices" not in arguments:
            same_choice(face, x, ours[1], theirs[1])
        near("gradient", our_grad, their_grad, D * (step + 1))
        for name, grad in their_grads.items():
            near(name, our_grads[name], grad, B * N * 2)
        for name, value in peer.state_dict().items():
            got = face.state_dict()[name]
            assert torch.equal(got, value) if value.dtype == torch.bool else True
            near(name, got.float(), value.float(), B * N * (step + 1))
            grad = dict(peer.named_buffers())[name].grad if name in dict(peer.named_buffers()) else None
            if grad is not None:
                near(name, dict(face.named_buffers())[name].grad, grad, B * N * (step + 1))


@pytest.mark.parametrize("case", [c for c in CASES if c not in ("affine", "directional")])
def test_evaluates_and_decodes_as_the_peer(case):
    options, shape, _ = CASES[case]
    peer, face = (module.eval() for module in pair(options))
    x = torch.randn(B, *shape)
    before = {k: v.clone() for k, v in face.state_dict().items()}
    theirs, ours = peer(x), face(x)
    same_choice(face, x, ours[1], theirs[1])
    near("quantized", ours[0], theirs[0], D)
    assert ours[2].item() == 0
    decoded = face.get_output_from_indices(ours[1])
    near("decoded", decoded, ours[0], D)
    # the peer neither merges shared heads nor projects what has its features first
    if "heads" not in options:
        near("codes", face.get_codes_from_indices(ours[1]), peer.get_codes_from_indices(ours[1]), D)
    assert all(torch.equal(v, before[k]) for k, v in face.state_dict().items())
    peer.load_state_dict(face.state_dict())


def test_breakdown_and_known_indices():
    peer, face = pair({})
    x = torch.randn(B, N, D)
    theirs, ours = peer(x, return_loss_breakdown=True), face(x, return_loss_breakdown=True)
    assert ours[3]._fields == theirs[3]._fields
    for name in ours[3]._fields:
        near(name, getattr(ours[3], name), getattr(theirs[3], name), B * N)
    for module in (peer, face):
        module.update_ema_indices(x, theirs[1], mask=torch.arange(N) < LENS[:, None])
    near("codes", face.codebook, peer.codebook, 2 * B * N)


@pytest.mark.parametrize("case", CASES)
def test_adopts_a_live_peer(case):
    options, shape, arguments = CASES[case]
    peer, _ = pair(options)
    peer(torch.randn(B, *shape), **arguments)
    peer.train(case != "plain")
    state = torch.get_rng_state()
    face = VectorQuantize.adopt(peer)
    assert torch.equal(torch.get_rng_state(), state)
    assert face.training == peer.training
    theirs = dict(peer.named_parameters()) | dict(peer.named_buffers())
    ours = dict(face.named_parameters()) | dict(face.named_buffers())
    assert ours.keys() == theirs.keys() and all(ours[name] is theirs[name] for name in ours)
    assert face.in_place_codebook_optimizer is peer.in_place_codebook_optimizer
    again = library.VectorQuantize(**VectorQuantize.options_of(peer))
    assert again.state_dict().keys() == {k for k in peer.state_dict() if "batch_" not in k}
    face(torch.randn(B, *shape), **arguments)


def test_draws_codes_by_the_peers_law():
    options = {"stochastic_sample_codes": True, "sample_codebook_temp": 0.5}
    peer, face = pair(options)
    x = torch.randn(1, 1, D).expand(1, 4000, D)
    counts = [m(x, freeze_codebook=True)[1].flatten().bincount(minlength=K) for m in (peer, face)]
    expected = 4000 * (-torch.cdist(x[0, :1], face.codebook) / 0.5).softmax(-1)[0].detach()
    for found in counts:
        # chi squared of K - 1 degrees of freedom: five deviations
        assert ((found - expected).square() / expected).sum() < K - 1 + 5 * (2 * (K - 1)) ** 0.5
