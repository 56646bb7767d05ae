"""The faces of FSQ and LFQ beside the installed vector-quantize-pytorch."""

import math

import pytest
import torch
from face_pairs import assert_near, assert_same, leaves, pair, run
from torch import nn

peers = pytest.importorskip("vector_quantize_pytorch")

from vqkernels.compat.vector_quantize_pytorch import FSQ, LFQ, _entropy  # noqa: E402

# rounded, bounded and scaled: each value by itself; at most 8 features meet in a linear layer, forward and back
FSQ_ROUNDINGS = 2 * 8 + 8

FSQ_CASES = {
    "plain": ({"levels": [8, 5, 5, 5]}, (2, 9, 4)),
    "image": ({"levels": (8, 6, 5)}, (2, 3, 4, 5)),
    "channels first": ({"levels": [5, 3], "dim": 7, "channel_first": True}, (2, 7, 9)),
    "codebooks": ({"levels": [4, 3], "num_codebooks": 3, "dim": 5, "projection_has_bias": False}, (2, 9, 5)),
    "symmetric": ({"levels": [2, 3, 5], "preserve_symmetry": True, "noise_dropout": 0.5}, (2, 9, 3)),
    "symmetric images": (
        {"levels": [2, 3], "num_codebooks": 2, "preserve_symmetry": True, "noise_dropout": 0.5},
        (2, 4, 3, 5),
    ),
    "rotated": ({"levels": [5, 5], "orthogonal_rotation": True, "bound_hard_clamp": True}, (2, 9, 2)),
    "no indices": ({"levels": [5, 5], "return_indices": False}, (2, 9, 2)),
    "kept dimension": ({"levels": [4], "keep_num_codebooks_dim": True}, (2, 1, 2, 2)),
}


@pytest.mark.parametrize("case", FSQ_CASES)
def test_fsq_is_its_peer(case):
    options, shape = FSQ_CASES[case]
    face, peer, adopted = pair(FSQ, peers.FSQ, **options)
    x = 2 * torch.randn(shape)
    for training in (True, False):
        for module in (face, peer, adopted):
            module.train(training)
        want = run(peer, x)
        for module in (face, adopted):
            got = run(module, x)
            assert_same(got, want, FSQ_ROUNDINGS)
            indices = got[0][1]
            if indices is not None:
                assert torch.equal(module.indices_to_codes(indices), peer.indices_to_codes(indices))
                levels = module.indices_to_level_indices(indices)
                assert torch.equal(levels, peer.indices_to_level_indices(indices))
    if peer.return_indices:
        assert (
            torch.equal(face.implicit_codebook, peer.implicit_codebook)
            and face.codebook_size == peer.codebook_size
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_fsq_of_other_dtypes_is_its_peer(dtype):
    face, peer, _ = pair(FSQ, peers.FSQ, [8, 5, 3])
    x = torch.randn(2, 9, 3).to(dtype)
    # the same operations in the same order
    assert_same(run(face, x), run(peer, x), 1)


@pytest.mark.parametrize("symmetric", [False, True])
def test_rotated_codes_are_numbered_back(symmetric):
    """The peer reads levels off codes that are still rotated."""
    face = FSQ([5, 5], preserve_symmetry=symmetric, orthogonal_rotation=True)
    everyone = torch.arange(25, dtype=torch.int32)[None]
    assert torch.equal(face.codes_to_indices(face.indices_to_codes(everyone)), everyone)


def test_indices_beyond_2_to_24_are_exact():
    """A float32 sum, as in the peer, cannot tell such numbers apart."""
    levels = [1001, 1001, 31]
    face = FSQ(levels, return_indices=False)
    digits = torch.tensor([[1000, 1000, 30], [999, 1000, 30], [500, 500, 15]], dtype=torch.int32)
    middle = torch.tensor([500, 500, 15])
    numbers = [sum(d * math.prod(levels[:i]) for i, d in enumerate(row)) for row in digits.tolist()]
    assert face.codes_to_indices((digits - middle) / middle).tolist() == numbers
    assert torch.equal(face.indices_to_level_indices(torch.tensor(numbers)), digits)


LFQ_CASES = {
    "plain": ({"codebook_size": 64}, (2, 9, 6), {}),
    "codebooks": (
        {"dim": 8, "codebook_size": 16, "num_codebooks": 2, "commitment_loss_weight": 0.3},
        (2, 8, 3, 4),
        {"inv_temperature": 1.0},
    ),
    "sphere": (
        {
            "dim": 6,
            "spherical": True,
            "codebook_scale": 0.5,
            "frac_per_sample_entropy": 0.4,
            "commitment_loss_weight": 1.0,
        },
        (2, 9, 6),
        {"inv_temperature": 1.0, "mask": torch.tensor([True, False])},
    ),
    "soft clamp": (
        {"dim": 5, "codebook_size": 16, "projection_has_bias": False, "soft_clamp_input_value": 2.0},
        (2, 9, 5),
        {"inv_temperature": 1.0},
    ),
    "cosine": (
        {
            "dim": 7,
            "codebook_size": 16,
            "cosine_sim_project_in": True,
            "cosine_sim_project_in_scale": 3.0,
            "experimental_softplus_entropy_loss": True,
        },
        (2, 9, 7),
        {"inv_temperature": 0.1},
    ),
    "rotated": (
        {
            "codebook_size": 8,
            "orthogonal_rotation": True,
            "channel_first": True,
            "straight_through_activation": nn.Tanh(),
        },
        (2, 3, 9),
        {"inv_temperature": 0.1},
    ),
}


@pytest.mark.parametrize("chunk", [1 << 22, 100])
@pytest.mark.parametrize("case", LFQ_CASES)
def test_lfq_is_its_peer(case, chunk, monkeypatch):
    monkeypatch.setattr(_entropy, "_CHUNK", chunk)
    options, shape, call = LFQ_CASES[case]
    face, peer, adopted = pair(LFQ, peers.LFQ, **options)
    x = torch.randn(shape)
    # a logit is a sum of b products and is exponentiated, which multiplies its error by its size; then K numbers,
    # at most 24 rows and a linear layer of 8
    bits = face.codebook_dim
    logit = 2 * call.get("inv_temperature", 100.0) * bits
    roundings = logit * bits + face.codebook_size + 24 + 8
    for training in (True, False):
        for module in (face, peer, adopted):
            module.train(training)
        want = run(peer, x, return_loss_breakdown=True, **call)
        # what two entropies of at most ln K leave of each other
        size = math.log(face.codebook_size) * (1 + face.diversity_gamma)
        for module in (face, adopted):
            got = run(module, x, return_loss_breakdown=True, **call)
            (ours, parts), (theirs, their_parts) = got[0], want[0]
            assert (
                type(ours)._fields == type(theirs)._fields
                and type(parts)._fields == type(their_parts)._fields
            )
            assert_near(ours.quantized, theirs.quantized, 4 * bits)
            assert torch.equal(ours.indices, theirs.indices)
            for a, b in zip(leaves((ours[2], parts)), leaves((theirs[2], their_parts)), strict=True):
                assert abs(a - b) <= roundings * 2**-23 * size
            for a, b in zip(got[1], want[1], strict=True):
                assert_near(a, b, roundings)
            assert torch.equal(module.indices_to_codes(ours.indices), peer.indices_to_codes(ours.indices))
            bits_alone = module.indices_to_codes(ours.indices, project_out=False)
            assert torch.equal(bits_alone, peer.indices_to_codes(ours.indices, project_out=False))
            assert module.outcome(got[0])[1] is ours.indices and module.outcome(ours)[0] is ours.quantized


def test_lfq_masks_rows():
    """A mask of rows is as if the others were not there; the peer then has no term of diversity."""
    face = LFQ(codebook_size=16, commitment_loss_weight=0.5)
    x, mask = torch.randn(2, 9, 4), torch.rand(2, 9) > 0.4
    _, got = face(x, inv_temperature=0.3, mask=mask, return_loss_breakdown=True)
    _, want = face(x[mask][None], inv_temperature=0.3, return_loss_breakdown=True)
    assert torch.equal(torch.stack(got), torch.stack(want))
    assert got.batch_entropy > got.per_sample_entropy


def test_lfq_returns_codes_and_a_finite_loss_of_one_row():
    """In training the value is the code to the bit, and a share of one row is that row."""
    face = LFQ(dim=2, codebook_size=4, frac_per_sample_entropy=0.1)
    x = torch.tensor([[[0.1, -0.2]]], requires_grad=True)
    z, indices, loss = face(x, inv_temperature=1.0)
    loss.backward()
    assert torch.equal(z, face.indices_to_codes(indices)) and loss.isfinite() and x.grad.isfinite().all()


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: FSQ([2, 3]), "levels"),
        (lambda: FSQ([1 << 16, 1 << 16]), "levels"),
        (lambda: FSQ([3, 3], noise_dropout=0.1), "noise_dropout"),
        (lambda: FSQ([3, 3], num_codebooks=2, keep_num_codebooks_dim=False), "keep_num_codebooks_dim"),
        (lambda: FSQ([3, 3])(torch.zeros(1, 2, 3)), "z"),
        (lambda: FSQ([3, 3]).codes_to_indices(torch.zeros(1, 2, 3)), "zhat"),
        (lambda: LFQ(), "dim"),
        (lambda: LFQ(codebook_size=12), "codebook_size"),
        (lambda: LFQ(dim=3, frac_per_sample_entropy=0.0), "frac_per_sample_entropy"),
        (lambda: LFQ(dim=3, soft_clamp_input_value=0.5), "soft_clamp_input_value"),
        (
            lambda: LFQ(codebook_size=8, num_codebooks=2, keep_num_codebooks_dim=False),
            "keep_num_codebooks_dim",
        ),
        (lambda: LFQ(dim=3)(torch.zeros(1, 2, 4)), "x"),
    ],
)
def test_what_scalar_faces_refuse(make, word):
    with pytest.raises(ValueError, match=rf"^(FSQ|LFQ): {word} must .*; got .*\. .*\.$"):
        make()


def test_lfq_looks_at_the_rows_of_all_ranks(monkeypatch):
    """H of the mean over two ranks, each with the gradient of its own share; the peer halves its own mean instead."""
    y, codes = torch.randn(9, 1, 4), LFQ(dim=4).codebook
    theirs = torch.randn(9, 1, 4)
    rows = torch.cat((y, theirs)).requires_grad_()
    want = _entropy.entropies(rows, codes, 0.5)[1]
    (slope,) = torch.autograd.grad(want, rows)
    other = _entropy._sums(theirs, codes, 0.5)[1] / 9
    monkeypatch.setattr(_entropy, "distributed", lambda: True)
    monkeypatch.setattr(_entropy, "all_sum", lambda mean: mean.add_(other))
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    y.requires_grad_()
    got = _entropy.entropies(y, codes, 0.5)[1]
    (own,) = torch.autograd.grad(got, y)
    # sums of 18 rows and 16 codes; a wrapper halves the sum of gradients over ranks
    assert_near(got, want, 18 + 16)
    assert_near(own / 2, slope[:9], 2 * (18 + 16))


@pytest.mark.parametrize("level", [1002, 1003, 4096])
def test_fsq_of_many_levels_saturates_at_the_last(level):
    """The margin of a thousand levels reaches a level too many, which would be the next feature's digit."""
    face = FSQ([level, 3])
    z, indices = face(torch.tensor([[[-100.0, -100.0], [100.0, -100.0]]]))
    assert indices.tolist() == [[0, level - 1]] and torch.equal(face.indices_to_codes(indices), z)


def test_entropy_of_very_unlikely_codes_is_cut_off_as_in_the_peer():
    """2^17 codes of one probability: ln 10^5 and not ln 2^17."""
    y, codes = torch.zeros(1, 1, 17), LFQ(dim=17).codebook
    for entropy in _entropy.entropies(y, codes, 1.0):
        # a sum of 2^17 equal numbers, in pairs
        assert abs(float(entropy) - math.log(1e5)) < 17 * 2**-23 * math.log(1e5) * 4
