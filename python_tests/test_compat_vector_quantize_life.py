"""What faces of vector-quantize-pytorch meet in training loops: empty batches, broken rows, checkpoints, graphs."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from vqkernels.compat.vector_quantize_pytorch import ResidualVQ, VectorQuantize

D, K = 8, 16
OWN = {"learnable_codebook": True, "ema_update": False}
OPTIONS = [
    {},
    OWN,
    {"use_cosine_sim": True, "threshold_ema_dead_code": 2},
    {"affine_param": True},
    {"heads": 2, "codebook_dim": 3},
    {"directional_reparam": True, "threshold_ema_dead_code": 2},
    {"orthogonal_reg_weight": 1.0},
    {"commitment_use_cross_entropy_loss": True},
    {"codebook_diversity_loss_weight": 0.1},
    {"num_quantizers": 2},
    {"num_quantizers": 2, "beam_size": 2},
    {"num_quantizers": 2, "diveq": True},
]


def make(options):
    torch.manual_seed(0)
    kind = ResidualVQ if "num_quantizers" in options else VectorQuantize
    return kind(dim=D, codebook_size=K, **options)


def state_is_finite(quantizer):
    return all(tensor.isfinite().all() for tensor in quantizer.state_dict().values())


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_batch_without_rows_changes_nothing_for_the_worse(options):
    quantizer = make(options)
    quantizer(torch.randn(2, 20, D, requires_grad=True))
    for batch, mask in (((0, 5), None), ((2, 0), None), ((2, 5), torch.zeros(2, 5, dtype=torch.bool))):
        z, indices, loss = quantizer(torch.randn(*batch, D, requires_grad=True), mask=mask)
        assert z.shape == (*batch, D) and indices.shape[:2] == batch
        assert loss.isfinite().all() and state_is_finite(quantizer)
        (z.sum() + loss.sum()).backward()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_broken_row_has_no_part_in_losses_and_codes(options):
    quantizer = make(options)
    x = torch.randn(2, 20, D)
    x[0, 3], x[1, 0, 2] = torch.nan, torch.inf
    x.requires_grad_()
    _, _, loss = quantizer(x)
    assert loss.isfinite().all() and state_is_finite(quantizer)
    loss.sum().backward()
    # a projection sees such a row itself
    codes = [one for name, one in quantizer.named_parameters() if name.endswith("embed")]
    assert all(one.grad is None or one.grad.isfinite().all() for one in codes)


def test_a_masked_row_has_no_part_in_the_diversity_loss():
    quantizer = make({**OWN, "codebook_diversity_loss_weight": 1.0, "commitment_weight": 0.0})
    x = torch.randn(2, 5, D)
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[0, 3:] = mask[1, 4] = False
    losses = [quantizer(torch.where(mask[..., None], x, other), mask=mask)[2] for other in (0.0, 3.0)]
    assert torch.equal(*losses)
    # positions of one item, each with its own distribution
    first = torch.stack([quantizer(x[:, n : n + 1], mask=mask[:, n : n + 1])[2] for n in range(4)])
    torch.testing.assert_close(losses[0], first.mean())


def test_an_in_place_optimizer_steps_once_under_a_checkpoint():
    results = []
    for wrapped in (False, True):
        quantizer = make({**OWN, "in_place_codebook_optimizer": lambda own: torch.optim.SGD(own, lr=0.5)})
        x = torch.randn(2, 20, D, requires_grad=True)
        z, _, loss = checkpoint(quantizer, x, use_reentrant=False) if wrapped else quantizer(x)
        (z.square().sum() + loss).backward()
        results.append((quantizer.codebook.detach().clone(), x.grad))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])


def test_an_in_place_optimizer_rests_where_codes_are_frozen_parameters():
    quantizer = make({**OWN, "in_place_codebook_optimizer": torch.optim.SGD})
    quantizer.requires_grad_(False)
    before = quantizer.codebook.clone()
    quantizer(torch.randn(2, 20, D))
    assert torch.equal(quantizer.codebook, before)


def test_codes_that_were_copied_into_the_buffers_do_not_start_again():
    trained, copy = make({"kmeans_init": True}), make({"kmeans_init": True})
    x = torch.randn(1, 40, D)
    trained(x)
    with torch.no_grad():
        for name, tensor in copy.state_dict().items():
            tensor.copy_(trained.state_dict()[name])
    copy.eval()(torch.randn(1, 40, D))
    assert torch.equal(copy.codebook, trained.codebook)


@pytest.mark.parametrize("cosine", [False, True])
def test_a_graph_without_breaks_replaces_dead_codes(cosine):
    quantizer = make({"use_cosine_sim": cosine, "threshold_ema_dead_code": 2})
    x = torch.randn(1, 12, D)
    _, indices, _ = torch.compile(quantizer, backend="eager", fullgraph=True)(x)
    rows = quantizer._codebook.transform_input(x)[0]
    # at most 11 rows share the mass of one code, so that most codes are below 2 and become rows
    taken = (quantizer.codebook[:, None] == rows).all(-1).any(1)
    assert taken.sum() == min(len(rows), int((quantizer._codebook.cluster_size == 2).sum())) > 0
    assert indices.shape == (1, 12)


def test_the_parts_of_the_loss_keep_the_codes_apart_as_the_peers():
    peer = pytest.importorskip("vector_quantize_pytorch")
    options = {"dim": D, "codebook_size": K, "accept_image_fmap": True, "orthogonal_reg_weight": 1.0}
    before, after = peer.VectorQuantize(**options), VectorQuantize(**options)
    after.load_state_dict(before.state_dict())
    x = torch.randn(2, D, 2, 3)
    for training in (True, False):
        grads = []
        for one in (before.train(training), after.train(training)):
            one.zero_grad()
            _, _, loss, parts = one(x, topk=3, return_loss_breakdown=True)
            assert loss.shape == (2, 2, 3, 3) and parts.commitment.shape == (2, 6, 3)
            loss.sum().backward()
            grads.append(one._codebook.embed.grad)
        torch.testing.assert_close(*grads)


def test_the_backward_of_a_compiled_graph_sees_the_codes_of_its_forward():
    quantizer = make({})
    state = {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}
    x = torch.randn(1, 40, D)
    grads = []
    # inductor alone takes a copy for its source
    for run in (quantizer, torch.compile(quantizer, fullgraph=True)):
        quantizer.load_state_dict(state)
        leaf = x.clone().requires_grad_()
        z, _, loss = run(leaf)
        (z.sum() + loss).backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)
