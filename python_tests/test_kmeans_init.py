"""Codes that start, and start again, by k-means: before the first batch is quantized, and from latents alone."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from vqkernels import nearest_code
from vqkernels.nn import (
    STE,
    Codebook,
    EMACodebook,
    Every,
    ImportanceReplacement,
    KMeansInit,
    LatentMeans,
    RepeatedKMeans,
    VectorQuantizer,
    build,
    kmeans,
)
from vqkernels.nn.quantizers import base
from vqkernels.testing import DEVICE

D, K = 5, 8


def fresh(name="ste", *, iterations=3, more=(), **options):
    torch.manual_seed(1)
    parts = [KMeansInit(iterations=iterations), *more]
    return build(name, dim=D, num_codes=K, upkeep=parts, **options).to(DEVICE)


@pytest.mark.parametrize("name", ["ste", "ema", "diveq", "sf_diveq"])
def test_the_first_batch_meets_the_new_codes(name):
    quantizer, x = fresh(name), torch.randn(100, D, device=DEVICE) + 50
    assert not quantizer.initialized
    torch.manual_seed(2)
    z, indices, _ = quantizer(x)
    codes = quantizer.export()
    assert quantizer.initialized and z.isfinite().all()
    # the start draws what the noise left, and puts it back
    torch.manual_seed(2)
    if quantizer.noisy:
        torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=DEVICE)
    drawn = torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=DEVICE)
    assert torch.equal(codes, kmeans(x, K, iterations=3, seed=drawn))
    if not name.startswith("sf"):
        assert torch.equal(indices.squeeze(-1), nearest_code(x, codes).indices)
    assert ((z - x).norm(dim=1) < 20).all()
    # the second batch starts nothing
    quantizer(x + 100)
    assert torch.equal(quantizer.export(), codes) or name == "ema"


def test_the_generator_is_left_alone():
    """What comes after the quantizer draws the same in the step that starts the codes as in any other."""
    quantizer, x = fresh(), torch.randn(50, D, device=DEVICE, requires_grad=True)
    drop = torch.nn.Dropout(0.5)
    state = torch.get_rng_state()
    expected = drop(torch.ones(50, D))
    torch.set_rng_state(state)
    quantizer(x)
    assert torch.equal(torch.get_rng_state(), state) or DEVICE.type == "cuda"
    # and so does the forward that a checkpoint runs again
    quantizer = fresh()
    torch.set_rng_state(state)
    out = checkpoint(lambda v: drop(quantizer(v).z), x, use_reentrant=False)
    (grad,) = torch.autograd.grad(out.sum(), x)
    if DEVICE.type == "cpu":
        assert torch.equal(grad, expected)
    assert torch.equal(grad.ne(0), out.ne(0))


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_masked_and_broken_rows_start_no_code(metric):
    quantizer = VectorQuantizer(Codebook(K, D), STE(), [KMeansInit(iterations=0)], metric=metric).to(DEVICE)
    x = torch.randn(4, 10, D, device=DEVICE)
    mask = torch.rand(4, 10, device=DEVICE) < 0.5
    mask[0, :3] = True
    x[0, 0, 1] = torch.nan
    quantizer(x, mask)
    good = mask & x.isfinite().all(-1)
    assert not nearest_code(quantizer.codebook.weight, quantizer.inside(x)[good]).sq_dist.any()


def test_evaluation_before_the_first_batch():
    quantizer, x = fresh().eval(), torch.randn(50, D, device=DEVICE)
    for run in (quantizer, quantizer.encode):
        with pytest.raises(
            RuntimeError, match=r"initialized to evaluate; got codes that wait .* quantizer.initialize"
        ):
            run(x)
    quantizer.initialize(x)
    assert quantizer.initialized and quantizer(x).indices.unique().numel() == K
    before = quantizer.export()
    quantizer.initialize(2 * x)
    assert torch.equal(quantizer.export(), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_any_layout_and_dtype(dtype):
    """Codes start from latents as they are compared with codes: behind the channels, projected."""
    parts = [KMeansInit(iterations=2)]
    quantizer = VectorQuantizer(Codebook(K, D), STE(), parts, channel_dim=1, dim=3).to(DEVICE)
    x = torch.randn(2, 3, 6, 6, device=DEVICE).to(dtype)
    torch.manual_seed(2)
    quantizer(x)
    torch.manual_seed(2)
    seed = torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=DEVICE)
    expected = kmeans(quantizer.inside(x.movedim(1, -1)), K, iterations=2, seed=seed)
    assert torch.equal(quantizer.codes(), expected)


def test_too_few_rows():
    quantizer = fresh()
    before = quantizer.export()
    with pytest.raises(ValueError, match="at least 8 finite rows, one per code; got 7"):
        quantizer(torch.randn(7, D, device=DEVICE))
    assert torch.equal(quantizer.export(), before) and not quantizer.initialized
    quantizer(torch.randn(8, D, device=DEVICE))
    assert quantizer.initialized


def test_after_a_warm_up():
    """Latents pass unquantized first; the codes then start twice, and the batch has the last word."""
    quantizer = fresh(more=[LatentMeans(2)])
    x = torch.randn(50, D, device=DEVICE)
    for _ in range(2):
        assert quantizer(x).indices.eq(-1).all() and not quantizer.initialized
        quantizer.commit()
    assert not quantizer.initialized
    assert quantizer(x).indices.min() >= 0 and quantizer.initialized


def test_a_state_dict_remembers_the_start():
    x = torch.randn(50, D, device=DEVICE)
    first, second = fresh(), fresh()
    second.load_state_dict(first.state_dict())
    assert not second.initialized
    first(x)
    second.load_state_dict(first.state_dict())
    assert second.initialized
    second(x + 9)
    assert torch.equal(first.export(), second.export())
    assert [r.to_dict() for r in first.report()] == [r.to_dict() for r in second.report()]
    # and one that has not started is loaded over one that has
    second.load_state_dict(fresh().state_dict())
    assert not second.initialized


def test_compiled_after_the_start_only():
    torch._dynamo.reset()
    quantizer, x = fresh("diveq"), torch.randn(50, D, device=DEVICE)
    quantizer.follow(torch.optim.SGD(quantizer.parameters(), 0.1))
    step = torch.compile(quantizer, fullgraph=True, backend="aot_eager")
    with pytest.raises(
        Exception, match=r"must be initialized to be compiled; .* Call quantizer\.initialize\(x\)"
    ):
        step(x)
    quantizer.initialize(x)
    assert step(x).indices.min() >= 0


def test_captured_after_the_start_only(monkeypatch):
    quantizer, x = fresh(), torch.randn(50, D, device=DEVICE)
    monkeypatch.setattr(base, "_capturing", lambda device: True)
    with pytest.raises(
        RuntimeError, match=r"initialized to be captured in a CUDA graph; .*quantizer\.initialize"
    ):
        quantizer(x)
    quantizer.initialize(x)
    assert quantizer(x).indices.min() >= 0


def test_the_start_resets_moments():
    quantizer, x = fresh(), torch.randn(50, D, device=DEVICE)
    optimizer = torch.optim.Adam(quantizer.parameters())
    quantizer.follow(optimizer)
    weight = quantizer.codebook.weight
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert optimizer.state[weight]["exp_avg"].all()
    quantizer(x)
    assert not optimizer.state[weight]["exp_avg"].any()


def refitted(period=3, **options):
    torch.manual_seed(1)
    part = RepeatedKMeans(Every(period), iterations=2, latents_per_code=10, **options)
    return VectorQuantizer(EMACodebook(K, D), STE(codebook_weight=0), [part]).to(DEVICE)


def test_all_codes_are_fitted_to_recent_latents():
    quantizer = refitted()
    batches = [torch.randn(30, D, device=DEVICE) + n for n in range(6)]
    for step, x in enumerate(batches, 1):
        quantizer(x)
        state = torch.get_rng_state()
        quantizer.commit()
        if step % 3 == 0:
            torch.set_rng_state(state)
            seed = torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=DEVICE)
            latents = torch.cat(batches[:step])[-80:]
            assert torch.equal(quantizer.export(), kmeans(latents, K, iterations=2, seed=seed))
            assert quantizer.codebook.mass.eq(1).all()
    (report,) = quantizer.report()
    assert report.to_dict() == {
        "name": "upkeep.0 RepeatedKMeans",
        "times": 2,
        "last_step": 6,
        "last_replaced": K,
        "replaced": 2 * K,
    }


def test_masked_latents_are_not_kept():
    quantizer, x = refitted(1), torch.randn(40, D, device=DEVICE)
    mask = torch.arange(40, device=DEVICE) % 2 == 0
    x[4] = torch.nan
    quantizer(x, mask)
    ring = quantizer.upkeep[0].recent
    assert torch.equal(ring.in_order("test", 1), x[mask & (torch.arange(40, device=DEVICE) != 4)])


def test_too_few_latents_to_fit():
    quantizer = refitted(1)
    quantizer(torch.randn(7, D, device=DEVICE))
    with pytest.raises(
        RuntimeError, match="RepeatedKMeans: training must see at least 8 finite latents; got 7"
    ):
        quantizer.commit()


def test_a_fit_survives_a_state_dict():
    batches = [torch.randn(12, D, device=DEVICE) for _ in range(6)]

    def run(quantizer, batches):
        for x in batches:
            quantizer(x)
            torch.manual_seed(2)
            quantizer.commit()

    whole, first, second = refitted(), refitted(), refitted()
    run(whole, batches)
    run(first, batches[:4])
    second.load_state_dict(first.state_dict())
    run(second, batches[4:])
    assert torch.equal(whole.export(), second.export())


def test_codes_that_cannot_be_overwritten():
    class Frozen(Codebook):
        assignable = False

    for part in (KMeansInit(), RepeatedKMeans(Every(5)), ImportanceReplacement(Every(5))):
        with pytest.raises(ValueError, match=f"overwritten for {type(part).__name__}; got Frozen"):
            VectorQuantizer(Frozen(K, D), STE(), [part])
