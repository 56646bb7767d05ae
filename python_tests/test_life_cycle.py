"""Who commits, and when: copies, several optimizers, interrupted runs, and several processes."""

import copy
import gc

import pytest
import torch
import torch.distributed as dist
from processes import two_processes

from vqkernels.nn import (
    STE,
    EMACodebook,
    Every,
    ImportanceReplacement,
    KMeansInit,
    LatentMeans,
    LeastRecentlyUsed,
    RepeatedKMeans,
    Residual,
    TwoPhase,
    VectorQuantizer,
    build,
)
from vqkernels.testing import DEVICE

D, K = 5, 8


def ema():
    torch.manual_seed(1)
    return VectorQuantizer(EMACodebook(K, D, init="normal"), STE(codebook_weight=0)).to(DEVICE)


def optimizer_of_nothing():
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], 0.1)


def moves(quantizer, optimizer=None):
    """Whether two training forwards, with steps of an optimizer, change the codes."""
    before = quantizer.export()
    for _ in range(2):
        quantizer(torch.randn(50, D, device=DEVICE))
        if optimizer is not None:
            optimizer.step()
    return not torch.equal(before, quantizer.export())


def test_an_optimizer_that_is_gone_does_not_stop_commits_without_a_word():
    quantizer = ema()
    quantizer.follow(optimizer_of_nothing())
    gc.collect()
    with pytest.raises(RuntimeError, match="followed optimizer must be alive to commit; got one that was"):
        quantizer(torch.randn(5, D, device=DEVICE))
    other = optimizer_of_nothing()
    quantizer.follow(other)
    assert moves(quantizer, other)


def test_parts_follow_nobody():
    """The whole commits its parts; an optimizer that a part followed would never reset a moment."""
    part, optimizer = ema(), optimizer_of_nothing()
    whole = Residual([part, ema()])
    with pytest.raises(ValueError, match=r"got a part of a Residual\. Call follow of the Residual"):
        part.follow(optimizer)
    whole.follow(optimizer)
    follows = ema()
    follows.follow(optimizer)
    with pytest.raises(ValueError, match="stages must follow no optimizer; got one that does"):
        Residual([follows])


def test_a_copy_follows_nobody_until_told(tmp_path):
    quantizer, first = ema(), optimizer_of_nothing()
    quantizer.follow(first)
    torch.save(quantizer, tmp_path / "q.pt")
    for other in (copy.deepcopy(quantizer), torch.load(tmp_path / "q.pt", weights_only=False)):
        # by itself at the next forward, then by an optimizer of its own
        assert moves(other)
        second = optimizer_of_nothing()
        other.follow(second)
        assert moves(other, second)
        assert torch.equal(quantizer.export(), ema().export())


def test_following_another_optimizer_ends_following_the_first():
    quantizer, first, second = ema(), optimizer_of_nothing(), optimizer_of_nothing()
    quantizer.follow(first)
    quantizer.follow(second)
    assert not moves(quantizer, first)
    assert moves(quantizer, second)


def test_a_step_without_a_forward_commits_nothing():
    quantizer, optimizer = ema(), optimizer_of_nothing()
    quantizer.follow(optimizer)
    for _ in range(5):
        optimizer.step()
    assert quantizer.get_extra_state().tolist() == [0, 0] and quantizer.codebook.mass.eq(1).all()
    warm = build("sf_diveq", dim=D, num_codes=K, upkeep=[LatentMeans(1)])
    warm.follow(optimizer)
    optimizer.step()
    assert not warm.initialized


@pytest.mark.parametrize("followed", [False, True])
def test_interrupted_between_forward_and_commit(followed):
    """A state_dict remembers that a forward waits for its commit."""
    torch.manual_seed(2)
    batches = [torch.randn(30, D, device=DEVICE) for _ in range(6)]

    def run(quantizer, batches):
        optimizer = optimizer_of_nothing()
        if followed:
            quantizer.follow(optimizer)
        for x in batches:
            quantizer(x)
            optimizer.step()
        return quantizer

    whole, first, second = run(ema(), batches), run(ema(), batches[:3]), ema()
    second.load_state_dict(first.state_dict())
    run(second, batches[3:])
    assert torch.equal(whole.export(), second.export())
    assert torch.equal(whole.get_extra_state(), second.get_extra_state())
    # a state that waits for nothing is loaded over one that does
    second.load_state_dict(ema().state_dict())
    assert second.get_extra_state().tolist() == [0, 0]


def importance():
    return ImportanceReplacement(TwoPhase(9, 2, stop_before=0), threshold=0.5)


# what is built, and its upkeep
CASES = {
    "ema": ("ema", lambda: [importance()]),
    "affine_ema": ("affine_ema", lambda: [importance()]),
    "diveq": ("diveq", lambda: [importance()]),
    "nsvq": ("nsvq", lambda: [importance()]),
    "sf_diveq": ("sf_diveq", lambda: [LatentMeans(2, latents_per_code=8)]),
    "sf_diveq_detach": ("sf_diveq_detach", lambda: [LatentMeans(2, latents_per_code=8)]),
    "k-means": ("diveq", lambda: [KMeansInit(iterations=2), importance()]),
    "repeated": ("ema", lambda: [RepeatedKMeans(Every(2), iterations=2, latents_per_code=8)]),
    "lru": ("ste", lambda: [LeastRecentlyUsed(2)]),
}


def steps(batches, rank):
    """Codes and outputs of several methods after a few steps, and their statistics on the way."""
    seen = {}
    for case, (name, upkeep) in CASES.items():
        # what a rank draws for itself must not matter
        torch.manual_seed(3)
        quantizer = build(name, dim=D, num_codes=K, upkeep=upkeep())
        if case == "lru":
            # most codes are far from everything
            quantizer.codebook.assign(100 * torch.arange(K)[:, None].expand(K, D))
        torch.manual_seed(100 + rank)
        for number, x in enumerate(batches):
            mask = x[:, 0] < 1 if number % 2 else None
            z = quantizer(x, mask).z
            waiting = {key: value.clone() for key, value in quantizer.state_dict().items()}
            quantizer.commit()
        seen[case] = (quantizer.export(), z.detach(), waiting)
    return seen


def on_rank(rank, batches):
    return steps([batch.chunk(2)[rank] for batch in batches], rank)


def uneven(rank):
    """What each rank says to batches of different sizes."""
    said = []
    for name in ("diveq", "sf_diveq"):
        upkeep = [LatentMeans(2)] if name == "sf_diveq" else []
        try:
            build(name, dim=D, num_codes=K, upkeep=upkeep)(torch.randn(5 - 2 * rank, D))
        except RuntimeError as error:
            said.append(str(error))
        dist.barrier()
    return said


def test_two_processes_equal_one():
    """Statistics, replacement, warm-up and noise of two ranks equal one process on the joint batch."""
    torch.manual_seed(7)
    # the warm-up remembers one and a half of these batches; a far cluster leaves most codes unused
    batches = [torch.randn(44, D) * torch.tensor([1.0, 1, 1, 0.01, 0.01]) for _ in range(4)]
    expected, found = steps(batches, 0), two_processes(on_rank, batches)
    for name in CASES:
        codes, z, waiting = expected[name]
        for rank in range(2):
            torch.testing.assert_close(found[rank][name][0], codes)
        torch.testing.assert_close(torch.cat([found[rank][name][1] for rank in range(2)]), z)
        # and something was replaced: but where a map keeps all codes among the latents, none was due
        assert (waiting["upkeep.0.history"][-1] > 0) == (name != "affine_ema"), name
        # every rank holds the statistics of all, at all times
        for key, value in waiting.items():
            assert torch.equal(found[0][name][2][key], found[1][name][2][key]), (name, key)
            torch.testing.assert_close(found[0][name][2][key], value)


def test_uneven_ranks_are_refused():
    """Every rank says so, before anything is gathered."""
    said = two_processes(uneven)
    for rank, rows in ((0, 5), (1, 3)):
        words = f"x must have as many rows on every rank; got {rows} on rank {rank}"
        assert len(said[rank]) == 2 and all(words in text for text in said[rank])
