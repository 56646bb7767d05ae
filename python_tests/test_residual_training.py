"""Residual quantizers in training: dropped stages, shared codebooks, one life cycle, how codes start."""

import pytest
import torch
import torch.nn.functional as F
from stages import D, K, Q, stage, stages

from vqkernels.nn import (
    STE,
    Codebook,
    Context,
    DiVeQ,
    EMACodebook,
    ImportanceReplacement,
    KMeansInit,
    LatentMeans,
    Product,
    Residual,
    SFDiVeQ,
    TwoPhase,
    VectorQuantizer,
    build,
)
from vqkernels.testing import DEVICE, brute_force


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("estimator", [STE, DiVeQ, SFDiVeQ])
def test_dropped_stages(estimator, joint):
    """Whole examples lose their last stages: index -1, value of the rest, no statistics; all counts appear."""
    quantizer = Residual(stages(estimator), joint=joint, min_stages=1)
    observed = []
    for s in quantizer.stages:
        s.observe = lambda x, indices: observed.append(indices)
    x = torch.randn(200, 4, D, device=DEVICE, requires_grad=True)
    z, indices, loss = quantizer(x)
    (z.square().sum() + loss).backward()
    kept = (indices >= 0).sum(-1)
    assert torch.equal(indices >= 0, kept[..., None] > torch.arange(Q, device=DEVICE))
    assert (kept == kept[:, :1]).all() and x.grad.isfinite().all()
    # 200 draws of three values: five standard deviations
    assert all(abs((kept[:, 0] == n).sum() - 200 / 3) < 5 * (200 * 2 / 9) ** 0.5 for n in (1, 2, 3))
    assert torch.equal(torch.stack(observed, -1), indices)
    if estimator is STE:
        expected = quantizer.decode(indices)
        torch.testing.assert_close(z, expected)
        sums = sum(
            torch.where(indices[..., q, None] >= 0, s.export()[indices[..., q].clamp_min(0)], 0)
            for q, s in enumerate(quantizer.stages)
        )
        torch.testing.assert_close(expected, sums)
    quantizer.eval()
    assert (quantizer(x).indices >= 0).all()


def test_each_row_is_an_example_where_there_is_nothing_else():
    quantizer = Residual(stages(STE), min_stages=2)
    kept = (quantizer(torch.randn(300, D, device=DEVICE)).indices >= 0).sum(-1)
    assert set(kept.tolist()) == {2, 3}
    assert (quantizer(torch.randn(D, device=DEVICE)).indices >= 0).sum() >= 2


def test_two_halves_equal_the_whole():
    """What processes do: row numbers say which examples drop what, and which noise they get."""
    quantizer = Residual(stages(DiVeQ), min_stages=1)
    x, seed = torch.randn(10, 3, D, device=DEVICE), torch.tensor(77, device=DEVICE)
    whole = quantizer.train_rows(x, Context(seed))
    halves = [quantizer.train_rows(x[5 * i : 5 * i + 5], Context(seed, 15 * i)) for i in range(2)]
    assert torch.equal(whole.indices, torch.cat([half.indices for half in halves]))
    assert torch.equal(whole.z, torch.cat([half.z for half in halves]))


def test_masked_and_dropped_rows_have_no_part_in_losses():
    """The losses are those of the rows that are left, stage by stage."""
    quantizer = Residual(stages(STE), min_stages=1)
    x = torch.randn(40, D, device=DEVICE)
    mask = torch.rand(40, device=DEVICE) < 0.7
    torch.manual_seed(2)
    z, indices, loss = quantizer(x, mask)
    expected, total = 0, torch.zeros_like(x)
    for q, s in enumerate(quantizer.stages):
        rows = indices[:, q] >= 0
        left, codes = (x - total)[rows], s.export()[indices[rows, q]]
        expected = expected + 1.25 * F.mse_loss(left, codes)
        total[rows] = total[rows] + codes
    torch.testing.assert_close(loss, expected)
    assert not z[~mask].any() and (indices[~mask] == -1).all()


def test_a_shared_codebook_sees_all_its_stages_and_commits_once():
    """One stage object three times: the EMA of one codebook over the residuals of all uses (DiVeQ eq. 3)."""
    one = stage(STE(codebook_weight=0), codebook=EMACodebook).double()
    quantizer = Residual([one] * 3)
    assert [key for key in quantizer.state_dict() if key.endswith("weight")] == ["stages.0.codebook.weight"]
    x, codes = torch.randn(60, D, dtype=torch.float64, device=DEVICE), one.export()
    quantizer(x)
    left, n, sums = x, torch.zeros(K, 1, device=DEVICE).double(), torch.zeros_like(codes)
    for _ in range(3):
        chosen = torch.cdist(left, codes).argmin(1)
        n.index_add_(0, chosen, torch.ones_like(left[:, :1]))
        sums.index_add_(0, chosen, left)
        left = left - codes[chosen]
    h = 0.99 + 0.01 * n
    assert torch.equal(one.export(), codes)
    quantizer.commit()
    torch.testing.assert_close(one.export(), codes + 0.01 * (sums - n * codes) / h, rtol=1e-12, atol=1e-12)
    assert one.get_extra_state().tolist() == [1, 0] and quantizer.export().shape == (3, K, D)
    other = Residual([stage(STE(codebook_weight=0), codebook=EMACodebook).double()] * 3)
    other.load_state_dict(quantizer.state_dict())
    assert torch.equal(other.export(), quantizer.export())


def test_only_the_top_has_a_life_cycle():
    quantizer = Residual(stages(lambda: STE(codebook_weight=0), codebook=EMACodebook))
    before, optimizer = quantizer.export(), torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], 0.1)
    quantizer.follow(optimizer)
    for _ in range(3):
        quantizer(torch.randn(30, D, device=DEVICE))
    assert torch.equal(quantizer.export(), before)
    optimizer.step()
    assert all((a != b).any() for a, b in zip(quantizer.export(), before, strict=True))
    assert all(s.get_extra_state().tolist() == [1, 0] for s in (quantizer, *quantizer.stages))
    optimizer.step()
    assert quantizer.stages[2].get_extra_state().tolist() == [1, 0]


def test_replacement_resets_the_moments_of_each_stage():
    upkeep = ImportanceReplacement(TwoPhase(9, 1, stop_before=0), threshold=1)
    quantizer = build("residual", dim=D, num_codes=K, upkeep=[upkeep]).to(DEVICE)
    assert not upkeep.bound and quantizer.stages[0].upkeep[0] is not quantizer.stages[1].upkeep[0]
    optimizer = torch.optim.Adam(quantizer.parameters())
    quantizer.follow(optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        quantizer(torch.randn(50, D, device=DEVICE)).z.square().sum().backward()
        optimizer.step()
    for s in quantizer.stages:
        moments = optimizer.state[s.codebook.weight]["exp_avg"]
        assert moments.eq(0).all(1).any() and moments.any()


def test_stages_warm_up_together():
    """z = x until the codes start: as means of the latents, then of what these codes leave of them (DiVeQ A.5)."""
    waiting = [stage(DiVeQ(), upkeep=[LatentMeans(2, latents_per_code=4)]) for _ in range(2)]
    quantizer = Residual([stage(DiVeQ()), *waiting])
    first = quantizer.stages[0]
    batches = [torch.randn(2 * K, D, device=DEVICE) for _ in range(2)]
    for x in batches:
        z, indices, loss = quantizer(x)
        assert torch.equal(z, x) and (indices == -1).all() and indices.shape == (2 * K, 3) and loss == 0
        quantizer.commit()
    assert quantizer.initialized
    left = torch.cat(batches)
    left = left - first.export()[brute_force(left, first.export())[0]]
    second = left.view(K, 4, D).mean(1)
    torch.testing.assert_close(quantizer.stages[1].export(), second)
    left = left - quantizer.stages[1].export()[brute_force(left, quantizer.stages[1].export())[0]]
    torch.testing.assert_close(quantizer.stages[2].export(), left.view(K, 4, D).mean(1))
    assert (quantizer(x).indices >= 0).all()


def test_codes_that_start_from_the_first_batch():
    """Each stage starts from what the stages before it leave, at the first forward or by `initialize`."""
    x = torch.randn(300, D, device=DEVICE)
    for joint in (True, False):
        quantizer = Residual([stage(DiVeQ(), upkeep=[KMeansInit()]) for _ in range(2)], joint=joint)
        assert not quantizer.initialized and not quantizer.warming
        indices = quantizer(x).indices
        assert (indices >= 0).all() and quantizer.initialized
        codes = quantizer.export().double()
        left = x.double()
        sizes = [left.square().sum(1).mean()]
        for c in codes:
            left = left - c[torch.cdist(left, c).argmin(1)]
            sizes.append(left.square().sum(1).mean())
        # sixteen random codes would make it longer
        assert sizes[1] < 0.8 * sizes[0] and sizes[2] < 0.8 * sizes[1]
    quantizer = Residual([stage(DiVeQ(), upkeep=[KMeansInit()]), Product([stage(DiVeQ(), dim=3)] * 2)])
    quantizer.initialize(x)
    assert quantizer.initialized and len(quantizer.report()) == 1
    z, indices, _ = quantizer.eval()(x)
    assert (z - x).square().sum() < x.square().sum() and (indices >= 0).all()


def test_a_warm_up_refuses_evaluation_and_reaches_all_parameters():
    quantizer = build("residual", dim=D, num_codes=K, upkeep=[LatentMeans(3)]).to(DEVICE)
    x = torch.randn(8, D, device=DEVICE, requires_grad=True)
    quantizer(x).z.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in quantizer.parameters())
    assert torch.equal(x.grad, torch.ones_like(x))
    with pytest.raises(RuntimeError, match="warm-up"):
        quantizer.eval()(x)


def test_two_stages_cannot_share_a_part():
    codebook = Codebook(K, D)
    with pytest.raises(ValueError, match="share a Codebook"):
        Residual([VectorQuantizer(codebook, STE()), VectorQuantizer(codebook, STE())])
