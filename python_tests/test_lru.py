"""Least-recently-used replacement, and the reports of all upkeep."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from vqkernels.nn import (
    STE,
    Codebook,
    EMACodebook,
    Every,
    ImportanceReplacement,
    KMeansInit,
    LeastRecentlyUsed,
    UpkeepReport,
    VectorQuantizer,
    build,
)
from vqkernels.testing import DEVICE

D, K = 2, 8


def lru(timeout=3, *, codebook=None, name="ste", more=()):
    torch.manual_seed(1)
    quantizer = build(name, dim=D, num_codes=K, upkeep=[LeastRecentlyUsed(timeout), *more]).to(DEVICE)
    # code 0 is near every latent of these tests, the others near none
    codes = torch.full((K, D), 1e3, device=DEVICE) + torch.arange(K, device=DEVICE)[:, None]
    codes[0] = 0
    quantizer.codebook.assign(codes)
    return quantizer


def rows_of(codes, x):
    """For each code, the number of the row of x that it is; K rows of x at most."""
    same = (codes[:, None] == x).all(2)
    assert same.sum(1).eq(1).all()
    return same.int().argmax(1)


def test_a_code_unused_for_long_becomes_a_latent():
    quantizer = lru()
    before = quantizer.export()
    for step in range(1, 4):
        x = torch.randn(50, D, device=DEVICE)
        quantizer(x)
        quantizer.commit()
        assert torch.equal(quantizer.export(), before) == (step < 3)
    after = quantizer.export()
    assert torch.equal(after[0], before[0])
    # different latents of the last batch
    assert rows_of(after[1:], x).unique().numel() == K - 1
    # their counters begin anew: two more steps without a row move nothing, the third does
    far = torch.full((20, D), -7e3, device=DEVICE) + torch.arange(20, device=DEVICE)[:, None]
    quantizer.codebook.assign(after.index_fill(0, torch.tensor(1, device=DEVICE), -7e3))
    before = quantizer.export()
    for step in range(1, 4):
        quantizer(far)
        quantizer.commit()
        assert torch.equal(quantizer.export(), before) == (step < 3)
    assert torch.equal(quantizer.export()[1], before[1])
    rows_of(quantizer.export()[2:], far)


def test_use_in_any_step_keeps_a_code():
    quantizer = lru(timeout=2)
    near, far = torch.zeros(4, D, device=DEVICE), quantizer.export()[1:2]
    for step in range(6):
        quantizer(torch.cat([near, far]) if step % 2 else near)
        quantizer.commit()
        # code 1 is used every other step
    assert torch.equal(quantizer.export()[1], far[0])
    assert not torch.equal(quantizer.export()[2], far[0] + 1)


def test_timeout_is_that_of_the_paper():
    assert LeastRecentlyUsed().timeout == 20


def test_latents_are_drawn_over_the_whole_batch():
    """Every latent is drawn equally often; not those of the first rows, nor of the last."""
    x = torch.arange(40.0, device=DEVICE)[:, None].expand(40, D) / 40
    hits = torch.zeros(40, device=DEVICE)
    quantizer = lru(timeout=1)
    start, runs = quantizer.export(), 200
    for _ in range(runs):
        quantizer.codebook.assign(start)
        quantizer(x)
        quantizer.commit()
        hits[rows_of(quantizer.export()[1:], x)] += 1
    # each of 8 parts of 5 rows gives a latent in 7 of 8 runs: a row has 7/40 of them; five standard errors
    expected = runs * 7 / 40
    assert (hits - expected).abs().max() < 5 * expected**0.5


def test_small_batches_lend_latents_of_the_steps_before():
    quantizer = lru(timeout=3)
    batches = [torch.randn(3, D, device=DEVICE) for _ in range(3)]
    for x in batches:
        quantizer(x)
        quantizer.commit()
    # nine latents seen, the last eight kept, seven wanted
    found = rows_of(quantizer.export()[1:], torch.cat(batches))
    assert found.unique().numel() == 7 and found.min() >= 1


def test_latents_are_repeated_where_there_are_too_few():
    quantizer, x = lru(timeout=1), torch.randn(3, D, device=DEVICE)
    quantizer(x)
    quantizer.commit()
    counts = rows_of(quantizer.export()[1:], x).bincount(minlength=3)
    assert sorted(counts.tolist()) == [2, 2, 3]


def test_masked_and_broken_rows_are_no_latents_and_no_use():
    quantizer = lru(timeout=2)
    x = torch.randn(40, D, device=DEVICE)
    mask = torch.arange(40, device=DEVICE) % 3 == 0
    x[3] = torch.nan
    x[1] = 1e3
    before = quantizer.export()
    for step in range(4):
        # steps in which nothing counts are no steps
        quantizer(x, mask if step % 2 else torch.zeros_like(mask))
        quantizer.commit()
        assert torch.equal(quantizer.export(), before) == (step < 3)
    good = mask & x.isfinite().all(1)
    rows_of(quantizer.export()[1:], x[good])


def test_no_data_no_replacement():
    quantizer = lru(timeout=1)
    before = quantizer.export()
    for _ in range(5):
        quantizer.commit()
    quantizer(torch.zeros(0, D, device=DEVICE))
    quantizer.commit()
    assert torch.equal(quantizer.export(), before)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_accumulation_counts_once(accumulate):
    quantizer = lru(timeout=2)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], 0.1)
    quantizer.follow(optimizer)
    before = quantizer.export()
    for step in range(2):
        for n in range(accumulate):
            # only one of the forwards of the step needs code 1
            x = torch.randn(20, D, device=DEVICE)
            quantizer(torch.cat([x, before[1:2]]) if n == 0 else x)
        optimizer.step()
        assert torch.equal(quantizer.export(), before) == (step < 1)
    assert torch.equal(quantizer.export()[:2], before[:2])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_counts_once(reentrant):
    """A forward that is run again sees nothing, and what follows the quantizer draws the same again."""
    plain, again, drop = lru(), lru(), torch.nn.Dropout(0.5)
    x = torch.randn(20, D, device=DEVICE, requires_grad=True)
    plain(x)
    out = checkpoint(lambda v: drop(again(v).z + v), x, use_reentrant=reentrant)
    out.sum().backward()
    assert torch.equal(x.grad.ne(0), out.ne(0))
    for a, b in zip(plain.buffers(), again.buffers(), strict=True):
        assert torch.equal(a, b)


def test_moments_and_mass_begin_anew():
    quantizer = lru(timeout=2)
    optimizer = torch.optim.Adam(quantizer.parameters())
    quantizer.follow(optimizer)
    state = optimizer.state[quantizer.codebook.weight]
    for _ in range(2):
        if state:
            state["exp_avg"].fill_(7)
        z, _, loss = quantizer(torch.randn(20, D, device=DEVICE, requires_grad=True))
        (z.sum() + loss).backward()
        optimizer.step()
    assert not state["exp_avg"][1:].any() and not state["exp_avg_sq"][1:].any() and state["exp_avg"][0].all()
    average = lru(timeout=1, name="ema")
    average(torch.randn(20, D, device=DEVICE))
    average.codebook.mass.fill_(5)
    average.commit()
    assert average.codebook.mass[1:].eq(1).all() and average.codebook.mass[0] > 5


def test_survives_a_state_dict():
    batches = [torch.randn(6, D, device=DEVICE) for _ in range(7)]

    def run(quantizer, batches):
        for x in batches:
            quantizer(x)
            torch.manual_seed(2)
            quantizer.commit()

    for cut in (1, 3, 5):
        whole, first, second = lru(), lru(), lru()
        run(whole, batches)
        run(first, batches[:cut])
        second.load_state_dict(first.state_dict())
        run(second, batches[cut:])
        assert torch.equal(whole.export(), second.export())
        assert [r.to_dict() for r in whole.report()] == [r.to_dict() for r in second.report()]


def test_it_does_not_wait_for_the_device():
    """No value leaves the device in a forward, a commit or a report: the meta device has none to give."""
    quantizer = build("ema", dim=D, num_codes=K, upkeep=[LeastRecentlyUsed(1)]).to("meta")
    for _ in range(2):
        x, indices = torch.empty(9, D, device="meta"), torch.empty(9, dtype=torch.int64, device="meta")
        quantizer.observe(x, indices)
        quantizer.commit()
        quantizer.report()


def test_compiled():
    torch._dynamo.reset()
    eager, compiled = lru(timeout=2), lru(timeout=2)
    optimizers = [torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], 0.1) for _ in range(2)]
    for quantizer, optimizer in zip((eager, compiled), optimizers, strict=True):
        quantizer.follow(optimizer)
    step = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        x = torch.randn(20, D, device=DEVICE)
        assert torch.equal(eager(x).indices, step(x).indices)
        for optimizer in optimizers:
            torch.manual_seed(3)
            optimizer.step()
        assert torch.equal(eager.export(), compiled.export())
    assert eager.report()[0].to_dict()["replaced"] > 0


def test_segments_are_no_codes():
    with pytest.raises(
        ValueError, match=r"LeastRecentlyUsed: estimator must have one training index per code"
    ):
        build("sf_diveq", dim=D, num_codes=K, upkeep=[LeastRecentlyUsed()])


def test_codes_that_cannot_be_overwritten():
    class Frozen(Codebook):
        assignable = False

    with pytest.raises(ValueError, match="overwritten for LeastRecentlyUsed; got Frozen"):
        VectorQuantizer(Frozen(K, D), STE(), [LeastRecentlyUsed()])


def test_reports():
    """What each upkeep has replaced, as tensors until it is asked for."""
    parts = [KMeansInit(iterations=1), LeastRecentlyUsed(2), ImportanceReplacement(Every(3), threshold=1.0)]
    quantizer = VectorQuantizer(EMACodebook(4, D), STE(codebook_weight=0), parts).to(DEVICE)
    assert [tuple(r.to_dict().values())[1:] for r in quantizer.report()] == [(0, 0, 0, 0)] * 3
    x = torch.tensor([[0.0, 0], [9, 0], [0, 9], [9, 9]], device=DEVICE)
    quantizer(x.repeat(5, 1))
    reports = quantizer.report()
    assert all(isinstance(r, UpkeepReport) and r.replaced.device.type == DEVICE.type for r in reports)
    assert [r.name for r in reports] == [f"upkeep.{n} {type(part).__name__}" for n, part in enumerate(parts)]
    quantizer.commit()
    for _ in range(2):
        # one corner of the square is left
        quantizer(x[:1].repeat(5, 1))
        quantizer.commit()
    seen = [tuple(r.to_dict().values())[1:] for r in quantizer.report()]
    # all at the start; three codes after two steps without a row; three with too few rows in the period
    assert seen == [(1, 0, 4, 4), (1, 3, 3, 3), (1, 3, 3, 3)]
    # a report is of its time
    assert reports[1].to_dict()["replaced"] == 0
    assert build("ste", dim=D, num_codes=K).report() == []
