"""Upkeep and the life cycle: codes change once per optimizer step, and only by what was really seen."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from vqkernels.nn import (
    STE,
    EMACodebook,
    Every,
    ImportanceReplacement,
    KMeansInit,
    LatentMeans,
    LeastRecentlyUsed,
    RepeatedKMeans,
    TwoPhase,
    VectorQuantizer,
    build,
)
from vqkernels.testing import DEVICE

D, K = 5, 8


def train(quantizer, optimizer, batches, *, accumulate=1):
    for n, x in enumerate(batches):
        z, _, loss = quantizer(x)
        (z.square().mean() + loss).backward()
        if (n + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()


def ema(**options):
    torch.manual_seed(1)
    return VectorQuantizer(EMACodebook(K, D, init="normal"), STE(codebook_weight=0), **options).to(DEVICE)


def some_optimizer():
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], 0.1)


def test_a_forward_changes_no_code():
    quantizer = ema()
    before = quantizer.export()
    quantizer(torch.randn(50, D, device=DEVICE))
    assert torch.equal(quantizer.export(), before)
    quantizer.commit()
    assert not torch.equal(quantizer.export(), before)


def test_commit_comes_with_the_next_forward_or_with_the_optimizer():
    batches = [torch.randn(50, D, device=DEVICE, requires_grad=True) for _ in range(4)]
    by_hook, by_forward, by_hand = ema(), ema(), ema()
    optimizer = some_optimizer()
    by_hook.follow(optimizer)
    train(by_hook, optimizer, batches)
    train(by_forward, some_optimizer(), batches)
    for x in batches:
        by_hand(x)
        by_hand.commit()
    assert torch.equal(by_hook.export(), by_hand.export())
    # the last batch of the unfollowed one waits for the next forward
    assert not torch.equal(by_forward.export(), by_hand.export())
    by_forward(batches[0])
    assert torch.equal(by_forward.export(), by_hand.export())


def test_evaluation_accumulates_nothing():
    quantizer = ema().eval()
    quantizer(torch.randn(50, D, device=DEVICE))
    assert not quantizer.codebook.counts.any()


def test_gradient_accumulation_counts_once():
    batches = [torch.randn(30, D, device=DEVICE, requires_grad=True) for _ in range(6)]
    split, whole = ema(), ema()
    for quantizer, data, accumulate in (
        (split, batches, 3),
        (whole, [torch.cat(batches[:3]), torch.cat(batches[3:])], 1),
    ):
        optimizer = some_optimizer()
        quantizer.follow(optimizer)
        train(quantizer, optimizer, data, accumulate=accumulate)
    torch.testing.assert_close(split.export(), whole.export())
    assert split.get_extra_state().tolist() == [2, 0]


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_counts_once(reentrant):
    x = torch.randn(50, D, device=DEVICE, requires_grad=True)
    plain, again = ema(), ema()
    (plain(x).z.square().sum()).backward()
    (checkpoint(lambda v: again(v).z, x, use_reentrant=reentrant).square().sum()).backward()
    assert torch.equal(plain.codebook.counts, again.codebook.counts) and plain.codebook.counts.sum() == 50
    noisy = build("diveq", dim=D, num_codes=K).to(DEVICE)
    grads = []
    for run in (noisy, lambda v: checkpoint(noisy, v, use_reentrant=reentrant)):
        torch.manual_seed(4)
        y = x.detach().clone().requires_grad_()
        run(y)[0].square().sum().backward()
        grads.append(y.grad)
    assert torch.equal(*grads)


def test_following_twice_commits_once():
    quantizer, optimizer = ema(), some_optimizer()
    quantizer.follow(optimizer)
    quantizer.follow(optimizer)
    train(quantizer, optimizer, [torch.randn(5, D, device=DEVICE, requires_grad=True)])
    assert quantizer.get_extra_state().tolist() == [1, 0]


@pytest.mark.parametrize(
    ("schedule", "due"),
    [
        (TwoPhase(4000), [*range(100, 2001, 100), 2500, 3000]),
        (TwoPhase(12, first=2, until=6, then=3, stop_before=2), [2, 4, 6, 9]),
        (TwoPhase.scaled(1200), [100, 200, 300, 400, 500, 600, 900]),
        (Every(1500), [1500, 3000]),
        (Every(1000, start=700), [1700, 2700, 3700]),
        (Every(1000, start=700, stop=2700), [1700, 2700]),
        (Every(1, stop=2), [1, 2]),
    ],
    ids=["paper", "small", "scaled", "every", "late", "some", "first"],
)
def test_schedules(schedule, due):
    steps = getattr(schedule, "total_steps", 4000)
    assert [step for step in range(1, steps + 1) if schedule.due(step)] == due


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: Every(0), ValueError, "Every: period must be at least 1; got 0"),
        (lambda: Every(2.0), TypeError, "Every: period must be an int; got float"),
        (lambda: Every(5, start=-1), ValueError, "Every: start must be at least 0; got -1"),
        (lambda: Every(5, start=10, stop=14), ValueError, "Every: stop must be at least 15; got 14"),
        (lambda: ImportanceReplacement(100), TypeError, r"schedule must have a method due\(step\); got 100"),
        (
            lambda: RepeatedKMeans(Every),
            TypeError,
            r"RepeatedKMeans: schedule must .*; got Every\. Pass Every\(100\)",
        ),
        (lambda: RepeatedKMeans(Every(1), iterations=-1), ValueError, "iterations must be at least 0"),
        (lambda: KMeansInit(iterations=1.5), TypeError, "KMeansInit: iterations must be an int"),
        (lambda: LeastRecentlyUsed(0), ValueError, "LeastRecentlyUsed: timeout must be at least 1; got 0"),
    ],
)
def test_upkeep_that_is_none(make, error, words):
    with pytest.raises(error, match=words):
        make()


def replacing(**options):
    return ImportanceReplacement(TwoPhase(100, first=2, until=100, stop_before=0), **options)


def test_importance_replacement():
    """Codes that real counts call dead move next to used ones, in proportion to use; nothing else moves."""
    quantizer = build("diveq", dim=2, num_codes=64, upkeep=[replacing()]).to(DEVICE)
    codes = torch.full((64, 2), 1e3, device=DEVICE)
    codes[0], codes[1] = torch.tensor([1.0, 0]), torch.tensor([0.0, 1])
    quantizer.codebook.assign(codes)
    # code 0 serves 3 rows for each one of code 1; code 2 serves a single row of 400
    x = torch.cat([codes[0].expand(300, 2), codes[1].expand(99, 2), codes[2:3]])
    for period in range(2):
        quantizer(x)
        quantizer.commit()
        assert torch.equal(quantizer.export(), codes) == (period == 0)
    new = quantizer.export()
    # threshold 0.01 * 800 / 64 = 0.125 rows: two rows of code 2 are enough to live
    assert torch.equal(new[:3], codes[:3])
    from_first = (new[3:] - codes[0]).norm(dim=1) < 0.1
    from_second = (new[3:] - codes[1]).norm(dim=1) < 0.1
    from_third = (new[3:] == codes[2]).all(1) | ((new[3:] - codes[2]).norm(dim=1) < 10)
    assert (from_first | from_second | from_third).all()
    assert 30 <= from_first.sum() <= 58 and 3 <= from_second.sum() <= 30
    # perturbed by 1e-3 of the source's root mean square, sqrt(1/2); about 90 draws, four standard errors
    jitter = (new[3:] - codes[0])[from_first].square().mean().sqrt()
    assert abs(jitter / (1e-3 * 0.5**0.5) - 1) < 4 / (2 * 2 * from_first.sum()) ** 0.5
    assert len(new.unique(dim=0)) == 64 and not quantizer.upkeep[0].counts.any()


def test_replacement_copies_used_codes_only():
    """The first code may be a dead one: no draw, not even 0, falls into its empty share."""
    quantizer = build("ste", dim=2, num_codes=64, upkeep=[replacing()]).to(DEVICE)
    codes = torch.full((64, 2), 1e3, device=DEVICE)
    codes[40] = 1
    quantizer.codebook.assign(codes)
    for _ in range(2):
        quantizer(codes[40:41])
        quantizer.commit()
    assert (quantizer.export() - 1).abs().max() < 0.1


def test_replacement_counts_finite_rows_only():
    """Rows that are not finite have index 0, but keep no code 0 alive."""
    quantizer = build("diveq", dim=2, num_codes=4, upkeep=[replacing(threshold=0.5)]).to(DEVICE)
    codes = torch.tensor([[9.0, 9], [1, 0], [0, 1], [-1, 0]], device=DEVICE)
    quantizer.codebook.assign(codes)
    x = torch.cat([codes[1:].repeat(20, 1), torch.full((60, 2), torch.nan, device=DEVICE)])
    for _ in range(2):
        quantizer(x)
        quantizer.commit()
    assert not torch.equal(quantizer.export()[0], codes[0])
    assert torch.equal(quantizer.export()[1:], codes[1:])


def test_nothing_is_kept_alive_before_the_codes_have_started():
    """During a warm-up EMA and replacement wait, also on the step that ends it."""
    upkeep = [LatentMeans(2, latents_per_code=2), ImportanceReplacement(TwoPhase(9, 1, stop_before=0))]
    quantizer = VectorQuantizer(EMACodebook(K, D), STE(codebook_weight=0), upkeep).to(DEVICE)
    x = torch.randn(2 * K, D, device=DEVICE)
    for _ in range(2):
        quantizer(x)
        quantizer.commit()
    assert quantizer.codebook.mass.eq(1).all()
    torch.testing.assert_close(quantizer.export(), x.view(K, 2, D).mean(1))


def test_defaults_are_those_of_the_paper():
    assert ImportanceReplacement(TwoPhase(5000)).threshold == 0.01
    assert ImportanceReplacement(TwoPhase(5000)).noise == 1e-3


def test_codes_of_equal_use_live_however_many_rows_there_are():
    """A mean of more rows than float32 has digits: nobody is below it."""
    quantizer = build("ste", dim=2, num_codes=3, upkeep=[replacing(threshold=1)]).to(DEVICE)
    quantizer.upkeep[0].counts.fill_(2**24 + 1)
    before = quantizer.export()
    for _ in range(2):
        quantizer.commit()
    assert torch.equal(quantizer.export(), before)


def test_moments_with_one_number_per_code_are_reset_too():
    quantizer = build("ste", dim=2, num_codes=4, upkeep=[replacing()]).to(DEVICE)
    quantizer.codebook.assign(torch.tensor([[1.0, 0], [0, 1], [50, 50], [-50, 50]], device=DEVICE))
    optimizer = torch.optim.Adafactor(quantizer.parameters(), 1e-3)
    quantizer.follow(optimizer)
    x = torch.tensor([[2.0, 0], [0, 2]], device=DEVICE).repeat(20, 1).requires_grad_()
    train(quantizer, optimizer, [x])
    moment = optimizer.state[quantizer.codebook.weight]["row_var"]
    moment.fill_(7)
    train(quantizer, optimizer, [x])
    assert moment[:2].all() and not moment[2:].any()


def test_replacement_resets_moments():
    quantizer = build("ste", dim=2, num_codes=4, upkeep=[replacing()]).to(DEVICE)
    quantizer.codebook.assign(torch.tensor([[1.0, 0], [0, 1], [50, 50], [-50, 50]], device=DEVICE))
    optimizer = torch.optim.Adam(quantizer.parameters(), 1e-3)
    quantizer.follow(optimizer)
    x = torch.tensor([[2.0, 0], [0, 2]], device=DEVICE).repeat(20, 1).requires_grad_()
    state = optimizer.state[quantizer.codebook.weight]
    train(quantizer, optimizer, [x])
    state["exp_avg"].fill_(7)
    train(quantizer, optimizer, [x])
    assert not state["exp_avg"][2:].any() and not state["exp_avg_sq"][2:].any()
    assert state["exp_avg"][:2].all()


def test_replacement_without_data_changes_nothing():
    quantizer = build("ste", dim=2, num_codes=4, upkeep=[replacing()])
    before = quantizer.export()
    for _ in range(4):
        quantizer.commit()
    assert torch.equal(quantizer.export(), before)


def test_replacement_does_not_wait_for_the_device():
    """No value leaves the device in a forward or a commit: the meta device has none to give."""
    quantizer = build("ema", dim=D, num_codes=K, upkeep=[replacing()]).to("meta")
    for _ in range(2):
        quantizer.codebook.observe(
            torch.empty(9, D, device="meta"), torch.empty(9, dtype=torch.int64, device="meta")
        )
        quantizer.upkeep[0].observe(
            torch.empty(9, D, device="meta"), torch.empty(9, dtype=torch.int64, device="meta")
        )
        quantizer.commit()


@pytest.mark.parametrize("rows", [3, 10, 64, 200])
def test_latent_means(rows):
    """Codes are means of consecutive blocks of the most recent finite latents, whatever the batch size."""
    quantizer = build("sf_diveq", dim=D, num_codes=K, upkeep=[LatentMeans(30, latents_per_code=3)]).to(DEVICE)
    kept = []
    for _ in range(30):
        assert not quantizer.initialized
        x = torch.randn(rows, D, device=DEVICE, requires_grad=True)
        dirty = x.detach().clone()
        dirty[0, 0] = torch.nan
        z, indices, loss = quantizer(dirty.requires_grad_())
        assert torch.equal(z[1:], dirty[1:]) and indices.eq(-1).all() and loss == 0
        kept.append(dirty.detach()[1:])
        z[1:].sum().backward()
        # the codes take part in the graph, for data-parallel reducers
        assert quantizer.codebook.weight.grad is not None
        quantizer.commit()
    latents = torch.cat(kept)[-3 * K :]
    block = len(latents) // K
    expected = latents[: block * K].view(K, block, D).mean(1)
    assert quantizer.initialized
    torch.testing.assert_close(quantizer.export(), expected)
    assert quantizer.upkeep[0].recent.rows.numel() == 0
    assert quantizer(x).indices.min() >= 0


@pytest.mark.parametrize("steps", [2, 5])
def test_warm_up_survives_a_state_dict(steps):
    def fresh():
        return build("sf_diveq", dim=D, num_codes=K, upkeep=[LatentMeans(4, latents_per_code=2)]).to(DEVICE)

    torch.manual_seed(0)
    batches = [torch.randn(10, D, device=DEVICE) for _ in range(8)]
    whole, first, second = fresh(), fresh(), fresh()
    for x in batches:
        whole(x)
        whole.commit()
    for x in batches[:steps]:
        first(x)
        first.commit()
    second.load_state_dict(first.state_dict())
    assert second.initialized == (steps > 4)
    for x in batches[steps:]:
        second(x)
        second.commit()
    assert torch.equal(whole.export(), second.export())
