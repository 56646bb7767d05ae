"""The faces of ResidualVQ and GroupedResidualVQ beside the installed vector-quantize-pytorch."""

import pytest
import torch
from face_pairs import assert_near, assert_not_farther, assert_same, pair, run

peers = pytest.importorskip("vector_quantize_pytorch")

from vqkernels.compat.face import UnservedOption  # noqa: E402
from vqkernels.compat.vector_quantize_pytorch import GroupedResidualVQ, ResidualVQ  # noqa: E402

D, K, Q = 6, 16, 3
ROWS = (2, 12, D)
# per stage two reductions over D for rotation and norms each, forward and backward, on top of the stages before;
# losses are means over the rows
ROUNDINGS = 8 * D * Q * Q + 2 * 12
# a moving average adds up at most all rows of a step, in each of three steps
STATE_ROUNDINGS = 3 * (2 * 12 * Q + 4) + ROUNDINGS

CASES = {
    "averages": {},
    "shared": {"shared_codebook": True},
    "learned": {"learnable_codebook": True, "ema_update": False},
    "sizes": {"codebook_size": (7, 5, 9), "num_quantizers": None},
    "projected": {"codebook_dim": 4},
    "cosine": {"use_cosine_sim": True},
    "straight through": {"rotation_trick": False, "quant_grad_frac": 0.5, "commitment_weight": 0.25},
    "dropout": {"quantize_dropout": True, "quantize_dropout_cutoff_index": 1},
    "dropout in pairs": {"quantize_dropout": True, "quantize_dropout_multiple_of": 2},
    # of the peer's averages after a beam search see below
    "beam": {"beam_size": 2, "ema_update": False, "beam_score_quantizer_weights": [1.0, 0.5, 2.0]},
    "shared beam": {"beam_size": 3, "eval_beam_size": 2, "shared_codebook": True, "ema_update": False},
}


def named(**options):
    return {"dim": D, "num_quantizers": Q, "codebook_size": K} | options


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_residual_is_its_peer(case, masked):
    """Three steps of training, then evaluation: outputs, gradients, losses and the state that follows."""
    options = named(**CASES[case])
    mask = torch.arange(12) < torch.tensor([[12], [7]]) if masked else None
    face, peer, adopted = pair(ResidualVQ, peers.ResidualVQ, **options)
    for step in range(4):
        if step == 3:
            for module in (face, peer, adopted):
                module.eval()
        x = torch.randn(ROWS)
        call = {"mask": mask, "return_all_codes": True, "rand_quantize_dropout_fixed_seed": step}
        want = run(peer, x, **call)
        for module in (face, adopted):
            got = run(module, x, **call)
            assert torch.equal(got[0][1], want[0][1])
            if masked and case == "cosine":
                # the peer's loss compares codes with rows that are not normalised
                assert_near(got[0][0], want[0][0], ROUNDINGS)
            else:
                assert_same(got, want, STATE_ROUNDINGS)
        for key, theirs in peer.state_dict().items():
            for module in (face, adopted):
                assert_near(module.state_dict()[key], theirs, STATE_ROUNDINGS)
    # codes of all stages and their sum are what the peer decodes
    indices = want[0][1]
    assert_near(face.get_codes_from_indices(indices), peer.get_codes_from_indices(indices), STATE_ROUNDINGS)
    assert_near(face.get_output_from_indices(indices), peer.get_output_from_indices(indices), STATE_ROUNDINGS)


def test_indices_are_nearest_where_they_differ():
    """Of long rows with near ties, the peer's indices differ only where they are not nearer."""
    options = {"dim": 64, "codebook_size": 128, "num_quantizers": 2}
    face, peer, _ = pair(ResidualVQ, peers.ResidualVQ, **options)
    x = 3 + 1e-2 * torch.randn(2, 300, 64)
    with torch.no_grad():
        _, ours, _ = face.eval()(x)
        _, theirs, _ = peer.eval()(x)
    first = face.layers[0]
    assert assert_not_farther(first, x, ours[..., 0], theirs[..., 0]) < 60
    best = torch.cdist(x.double(), first.codebook.double()).square().amin(-1)
    assert torch.equal(face.sq_dist_of(x, ours)[..., 0], first.sq_dist_of(x, ours[..., 0]))
    # features of 64 squares each
    torch.testing.assert_close(face.sq_dist_of(x, ours)[..., 0], best, rtol=1e-9, atol=0)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_beam_search_learns_from_the_path_it_took(shared, masked):
    """h' = 0.6 h + 0.4 counts and m' = 0.6 m + 0.4 sums of each stage's residuals along the returned indices."""
    options = named(beam_size=3, decay=0.6, shared_codebook=shared)
    face = ResidualVQ(**options)
    x = torch.randn(ROWS, requires_grad=True)
    mask = torch.arange(12) < torch.tensor([[12], [7]]) if masked else torch.ones(2, 12, dtype=torch.bool)
    books = [layer._codebook for layer in face.layers]
    codes = [book.embed[0].clone() for book in books]
    counts = [book.cluster_size[0].clone().double() for book in books]
    sums = [book.embed_avg[0].clone().double() for book in books]
    z, indices, losses = face(x, mask=mask)
    residual = x.detach()
    for stage in range(Q):
        at = 0 if shared else stage
        picked = indices[..., stage][mask]
        counts[at] = 0.6 * counts[at] + 0.4 * torch.bincount(picked, minlength=K)
        total = torch.zeros(K, D, dtype=torch.float64).index_add_(0, picked, residual[mask].double())
        sums[at] = 0.6 * sums[at] + 0.4 * total
        error = (residual - codes[stage][indices[..., stage].clamp_min(0)]).square().mean(-1)[mask]
        assert_near(losses[stage], error.mean(), 2 * 12 + D)
        residual = residual - codes[stage][indices[..., stage].clamp_min(0)]
    for book, count, total in zip(
        books, counts[:1] * Q if shared else counts, sums[:1] * Q if shared else sums
    ):
        assert_near(book.cluster_size[0], count.float(), STATE_ROUNDINGS)
        assert_near(book.embed_avg[0], total.float(), STATE_ROUNDINGS)
    # a pending backward is of the codes that forward used
    (z.sum() + losses.sum()).backward()
    assert x.grad.isfinite().all()


def test_a_wider_beam_comes_nearer():
    face = ResidualVQ(**named(beam_size=1)).eval()
    x = torch.randn(2, 40, D)
    errors = [(face(x, beam_size=beam)[0] - x).square().sum(-1) for beam in (1, 2, 8)]
    assert errors[0].mean() > errors[1].mean() > errors[2].mean()
    z, indices, losses = face(x, beam_size=K)
    assert losses.shape == (Q,) and indices.min() >= 0
    assert torch.equal(face.get_output_from_indices(indices), z)


@pytest.mark.parametrize("image", [False, True])
def test_diveq_is_noisy_in_training_alone(image):
    """z = x + |c - x| u: an error of the length of that of the sum of codes; all codes of a row get one gradient."""
    face = ResidualVQ(**named(diveq=True, accept_image_fmap=image))
    x = torch.randn((2, D, 3, 4) if image else ROWS).requires_grad_()
    z, indices, losses = face(x)
    z.sum().backward()
    decoded = face.get_output_from_indices(indices)
    decoded = decoded.movedim(-1, 1) if image else decoded
    dim = 1 if image else -1
    # two lengths of D numbers
    assert_near((z - x).norm(dim=dim), (decoded - x).norm(dim=dim), 4 * D + Q)
    assert not torch.equal(z, decoded) and not losses.any()
    grads = [layer._codebook.embed.grad[0].sum(0) for layer in face.layers]
    for grad in grads[1:]:
        assert_near(grad, grads[0], 2 * 24 + D)
    assert grads[0].any()
    face.eval()
    assert torch.equal(face(x)[0], face(x)[0])
    decoded = face.get_output_from_indices(face(x)[1])
    assert torch.equal(face(x)[0], decoded.movedim(-1, 1) if image else decoded)


def test_diveq_state_is_the_peer_s():
    pair(ResidualVQ, peers.ResidualVQ, **named(diveq=True))


def test_images_of_any_size():
    """The same as their rows."""
    torch.manual_seed(0)
    face = ResidualVQ(**named(accept_image_fmap=True, codebook_dim=4, quantize_dropout=True)).eval()
    rows = ResidualVQ(**named(codebook_dim=4)).eval()
    rows.load_state_dict(face.state_dict())
    x = torch.randn(2, D, 3, 4)
    z, indices, losses, codes = face(x, return_all_codes=True)
    want = rows(x.flatten(2).mT, return_all_codes=True)
    assert torch.equal(z, want[0].mT.unflatten(2, (3, 4))) and torch.equal(
        indices, want[1].unflatten(1, (3, 4))
    )
    assert (
        indices.shape == (2, 3, 4, Q) and losses.shape == (Q,) and torch.equal(codes.flatten(2, 3), want[3])
    )
    # coarse indices decode as if the stages after them were dropped
    coarse = torch.cat((indices[..., :1], torch.full_like(indices[..., 1:], -1)), dim=-1)
    assert torch.equal(face.get_output_from_indices(indices[..., :1]), face.get_output_from_indices(coarse))


def test_cross_entropy_of_each_stage_on_its_residual():
    face = ResidualVQ(**named()).eval()
    x = torch.randn(ROWS)
    targets = torch.randint(0, K, (2, 12, Q))
    z, got = face(x, indices=targets)
    want, indices, _ = face(x)
    residual, total = x, 0.0
    for stage, layer in enumerate(face.layers):
        logits = -torch.cdist(residual, layer.codebook, compute_mode="donot_use_mm_for_euclid_dist")
        total = total + torch.nn.functional.cross_entropy(logits.mT, targets[..., stage])
        residual = residual - layer.codebook[indices[..., stage]]
    assert torch.equal(z, want)
    # logits of D differences, then a mean of rows
    assert_near(got, total, 4 * D + 24)


def test_frozen_codes_and_recomputed_forwards_learn_once():
    for shared in (False, True):
        face = ResidualVQ(**named(shared_codebook=shared, freeze_codebook=True, beam_size=2))
        before = {key: value.clone() for key, value in face.state_dict().items()}
        x = torch.randn(ROWS, requires_grad=True)
        face(x)
        face(x, beam_size=1)
        assert all(torch.equal(value, before[key]) for key, value in face.state_dict().items())
        for beam in (1, 2):
            plain = ResidualVQ(**named(shared_codebook=shared, beam_size=beam))
            again = ResidualVQ(**named(shared_codebook=shared, beam_size=beam))
            again.load_state_dict(plain.state_dict())
            grads = []
            for module, rerun in ((plain, False), (again, True)):
                y = x.detach().clone().requires_grad_()
                z = torch.utils.checkpoint.checkpoint(module, y, use_reentrant=False) if rerun else module(y)
                (z[0].square().sum() + z[2].sum()).backward()
                grads.append(y.grad)
            assert torch.equal(*grads)
            state = again.state_dict()
            assert all(torch.equal(value, state[key]) for key, value in plain.state_dict().items())


@pytest.mark.parametrize("dropout", [False, True])
def test_grouped_is_its_peer(dropout):
    options = named(dim=2 * D, groups=2, quantize_dropout=dropout)
    face, peer, adopted = pair(GroupedResidualVQ, peers.GroupedResidualVQ, **options)
    for _ in range(2):
        x = torch.randn(2, 12, 2 * D)
        for module in (face, peer, adopted):
            module.train(not dropout)
        want = run(peer, x, return_all_codes=True)
        for module in (face, adopted):
            got = run(module, x, return_all_codes=True)
            assert got[0][1].shape == (2, 2, 12, Q) and len(got[0][3]) == 2
            assert_same(got, want, STATE_ROUNDINGS)
    indices = want[0][1]
    for decode in ("get_codes_from_indices", "get_output_from_indices"):
        assert_near(getattr(face, decode)(indices), getattr(peer, decode)(indices), STATE_ROUNDINGS)
    assert face.codebooks.shape == (2, Q, K, D)
    assert face.sq_dist_of(x, indices).shape == indices.shape


def test_groups_drop_the_same_stages_and_serve_images():
    face = GroupedResidualVQ(**named(dim=2 * D, groups=2, quantize_dropout=True, accept_image_fmap=True))
    x = torch.randn(2, 2 * D, 3, 4)
    for _ in range(4):
        _, indices, losses = face(x)
        assert torch.equal(indices[0] < 0, indices[1] < 0) and losses.shape == (2, Q)
    z, indices, _ = face.eval()(x)
    assert torch.equal(face.get_output_from_indices(indices).movedim(-1, 1), z)
    z, entropy = face(x, indices=indices)
    assert entropy.dim() == 0 and entropy > 0


def test_single_tokens():
    face = ResidualVQ(**named()).eval()
    x = torch.randn(5, D)
    z, indices, losses, codes = face(x, return_all_codes=True)
    assert z.shape == (5, D) and indices.shape == (5, Q) and losses.shape == (Q,) and codes.shape == (Q, 5, D)
    assert torch.equal(face(x[:, None])[0][:, 0], z) and torch.equal(face.get_output_from_indices(indices), z)
    assert face.sq_dist_of(x, indices).shape == indices.shape


@pytest.mark.parametrize(
    ("options", "error", "word"),
    [
        ({"heads": 2}, ValueError, "heads"),
        ({"implicit_neural_codebook": True}, UnservedOption, "implicit_neural_codebook"),
        ({"channel_last": False}, UnservedOption, "channel_last"),
        ({"accept_3d_fmap": True}, UnservedOption, "accept_3d_fmap"),
        ({"eval_beam_size": 2}, ValueError, "eval_beam_size"),
        ({"quantize_dropout_cutoff_index": -1}, ValueError, "quantize_dropout_cutoff_index"),
        ({"num_quantizers": None}, ValueError, "num_quantizers"),
        ({"codebook_size": (4, 5)}, ValueError, "num_quantizers"),
        ({"codebook_size": (4, 5, 4), "shared_codebook": True}, ValueError, "codebook_size"),
        ({"beam_score_quantizer_weights": [1.0]}, ValueError, "beam_score_quantizer_weights"),
    ],
)
def test_what_residual_refuses(options, error, word):
    with pytest.raises(error, match=rf"^ResidualVQ: {word} must .*; got .*\. .*\.$"):
        ResidualVQ(**named(**options))


def test_neural_codebooks_are_not_adopted():
    with pytest.raises(UnservedOption, match="implicit_neural_codebook"):
        ResidualVQ.adopt(peers.ResidualVQ(**named(implicit_neural_codebook=True)))


def test_adopted_stages_start_and_step_as_the_peer_s_would():
    """k-means waits where the peer's does, stage by stage, and optimizers of codes hold the same tensors."""
    peer = peers.ResidualVQ(**named(kmeans_init=True, quantize_dropout=True))
    peer(torch.randn(2, 20, D), rand_quantize_dropout_fixed_seed=1)
    waiting = [layer for layer in peer.layers if not layer._codebook.initted]
    assert 0 < len(waiting) < Q
    face = ResidualVQ.adopt(peer).eval()
    face(torch.randn(2, 20, D))
    assert all(layer._codebook.initted and layer._codebook.embed.any() for layer in waiting)

    def optimizer(parameters):
        return torch.optim.SGD(parameters, lr=0.1)

    for shared in (False, True):
        options = named(learnable_codebook=True, ema_update=False, shared_codebook=shared)
        peer = peers.ResidualVQ(**options, in_place_codebook_optimizer=optimizer)
        before = peer.layers[0]._codebook.embed.detach().clone()
        ResidualVQ.adopt(peer)(torch.randn(ROWS))
        assert not torch.equal(peer.layers[0]._codebook.embed, before)
