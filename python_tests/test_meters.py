"""Metrics over many updates: windows, processes and whatever else torchmetrics asks of a metric."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from processes import two_processes

from vqkernels.nn import build, metrics
from vqkernels.testing import DEVICE

pytest.importorskip("torchmetrics")

from torchmetrics import MetricCollection
from torchmetrics.wrappers import Running

from vqkernels.nn import meters

N, D, K, Q = 12, 4, 7, 2
EPS = torch.finfo(torch.float32).eps


def batches(count=5, rows=N):
    """Latents, what they became, two indices each, codes, images, gradients; one row not finite, one masked."""
    generator = torch.Generator().manual_seed(5)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE)

    made = []
    for number in range(count):
        # the batches differ in more than noise, so that a window that forgets the wrong one shows
        x = normal(rows, D) * (1 + number)
        z = x + normal(rows, D)
        indices = torch.randint(0, min(2 + number, K), (rows, Q), generator=generator).to(DEVICE)
        x[0, 1], z[0], indices[0] = torch.nan, torch.nan, 0
        indices[1], z[1] = -1, 0
        made.append(
            {
                "x": x,
                "z": z,
                "indices": indices,
                "codebook": normal(K, D),
                "image": normal(rows, 3),
                "reconstruction": normal(rows, 3),
                "gradients": [normal(2, 3), None],
                "reference": [normal(2, 3), normal(4)],
            }
        )
    return made


def everything(**options):
    counted = {"num_codes": K, **options}
    return {
        "perplexity": meters.Perplexity(**counted),
        "per_stage": meters.Perplexity(**counted, stages=Q),
        "usage": meters.Usage(**counted),
        "dead_codes": meters.DeadCodes(**counted, stages=Q),
        "entropy": meters.CodebookEntropy(**counted),
        "distortion": meters.Distortion(**options),
        "per_bit": meters.DistortionPerBit(**counted, stages=Q),
        "divergence": meters.Divergence(**options),
        "psnr": meters.PSNR(data_range=2.0, **options),
        "gap": meters.GradientGap(**options),
    }


def expected(seen):
    """The functions, on all batches at once."""
    joint = {
        name: torch.cat([b[name] for b in seen]) for name in ("x", "z", "indices", "image", "reconstruction")
    }
    x, z, indices = joint["x"], joint["z"], joint["indices"]
    used = metrics.used_indices(indices, x)
    counts, per_stage = metrics.code_counts(used, K), metrics.code_counts(used, K, per_stage=True)
    nearest = [metrics.nearest_sum(b["x"], b["codebook"], b["indices"]) for b in seen]
    distortion = metrics.distortion(x, z, indices)
    return {
        "perplexity": metrics.perplexity(counts),
        "per_stage": metrics.perplexity(per_stage),
        "usage": metrics.usage(counts),
        "dead_codes": metrics.dead_codes(per_stage),
        "entropy": metrics.entropy_bits(counts),
        "distortion": distortion,
        "per_bit": metrics.distortion_per_bit(distortion, per_stage),
        "divergence": (sum(total for total, _ in nearest) / sum(rows for _, rows in nearest)).float(),
        "psnr": metrics.psnr(joint["reconstruction"], joint["image"], data_range=2.0),
        "gap": torch.stack([metrics.gradient_gap(b["gradients"], b["reference"]) for b in seen])
        .double()
        .mean()
        .float(),
    }


def check(found, wanted):
    """Equal but for the roundings to float32 of a quotient of two numbers that are rounded themselves."""
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(
            found[name], value, rtol=4 * EPS, atol=0, msg=lambda text, name=name: name + text
        )


@pytest.mark.parametrize("window", [None, 1, 3, 5, 9])
@pytest.mark.parametrize("grouped", [True, False])
def test_a_collection_equals_the_joint_batch(window, grouped):
    """After every update: of the last W batches, or of all; what a metric does not take, it ignores."""
    collection = MetricCollection(everything(window=window), compute_groups=grouped).to(DEVICE)
    seen = []
    for one in batches():
        collection.update(**one, loss=None)
        seen = [*seen, one][-(window or 99) :]
        check(collection.compute(), expected(seen))
    if grouped:
        # equal counts are counted once, and nothing else is taken for one
        together = [group for group in collection.compute_groups.values() if len(group) > 1]
        assert sorted(map(sorted, together)) == [
            ["dead_codes", "per_stage"],
            ["entropy", "perplexity", "usage"],
        ]
    collection.reset()
    collection.update(**one)
    check(collection.compute(), expected([one]))


@pytest.mark.parametrize("window", [None, 2])
def test_forward_is_of_the_batch(window):
    collection = MetricCollection(everything(window=window)).to(DEVICE)
    made = batches()
    for one in made:
        check(collection(**one), expected([one]))
    check(collection.compute(), expected(made[-(window or 99) :]))


def test_codebook_metrics():
    """The ready-made collection takes the result of a quantizer, counts codes once, and asks the device nothing."""
    x = torch.randn(2, D, 3, 3, device=DEVICE, requires_grad=True)
    quantizer = build("diveq", dim=D, num_codes=K, channel_dim=1).to(DEVICE)
    q = quantizer(x)
    collection = meters.codebook_metrics(K, channel_dim=1, window=4).to(DEVICE)
    collection.update(x=x, **q._asdict())
    found = collection.compute()
    counts = metrics.code_counts(q.indices, K)
    distortion = metrics.distortion(x, q.z, channel_dim=1)
    check(
        found,
        {
            "perplexity": metrics.perplexity(counts),
            "usage": metrics.usage(counts),
            "dead_codes": metrics.dead_codes(counts),
            "entropy_bits": metrics.entropy_bits(counts),
            "distortion": distortion,
            "distortion_per_bit": metrics.distortion_per_bit(distortion, counts),
        },
    )
    assert sorted(len(group) for group in collection.compute_groups.values()) == [1, 1, 4]
    # no graph is held
    assert not any(value.requires_grad for value in found.values())
    there = collection.to("meta")
    there.update(x=x.to("meta"), z=q.z.to("meta"), indices=q.indices.to("meta"))
    assert all(value.device.type == "meta" for value in there.compute().values())


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("name", list(everything()))
def test_no_host_sync(name, window):
    """The meta device has no values to give."""
    metric = everything(window=window)[name].to("meta")
    taken = {
        key: [None if t is None else t.to("meta") for t in value]
        if isinstance(value, list)
        else value.to("meta")
        for key, value in batches(1)[0].items()
    }
    for _ in range(2):
        metric.update(**metric._filter_kwargs(**taken))
    assert metric.compute().device.type == "meta"


@pytest.mark.parametrize("window", [None, 3])
def test_a_state_dict_goes_on(window):
    made = batches()
    first, second = (MetricCollection(everything(window=window)).to(DEVICE) for _ in range(2))
    assert not first.state_dict()
    for collection in (first, second):
        collection.persistent(True)
    for one in made[:4]:
        first.update(**one)
    state = copy.deepcopy(first.state_dict())
    kept = copy.deepcopy(state)
    second.load_state_dict(state)
    for collection in (first, second):
        collection.update(**made[4])
    wanted = expected(made[-(window or 99) :])
    check(first.compute(), wanted)
    check(second.compute(), wanted)
    # what was loaded is left as it was
    assert all(value.equal(state[key]) for key, value in kept.items())


def test_a_state_of_another_size_is_refused():
    metric, other = meters.Usage(K, window=3), meters.Usage(K, window=4)
    metric.persistent(True)
    with pytest.raises(RuntimeError, match=r"size mismatch for counts: \(3, 7\) was saved, \(4, 7\) is here"):
        other.load_state_dict(metric.state_dict())
    assert other.counts.shape == (4, K)


@pytest.mark.parametrize("window", [None, 3])
def test_copies(window):
    made = batches()
    collection = MetricCollection(everything(window=window)).to(DEVICE)
    for one in made[:3]:
        collection.update(**one)
    for other in (collection.clone(), pickle.loads(pickle.dumps(collection))):
        for one in made[3:]:
            other.update(**one)
        check(other.compute(), expected(made[-(window or 99) :]))
    check(collection.compute(), expected(made[:3]))


def test_sums_stay_wide():
    """A model that becomes bfloat16 takes its metrics along."""
    model = torch.nn.Module()
    model.metric, one = meters.Distortion().to(DEVICE), batches(1)[0]
    model.metric.update(one["x"], one["z"], one["indices"])
    model.to(torch.bfloat16).half()
    assert (
        model.metric.sq_error.dtype == torch.float64
        and model.metric._defaults["sq_error"].dtype == torch.float64
    )
    check({"": model.metric.compute()}, {"": metrics.distortion(one["x"], one["z"], one["indices"])})


def test_running():
    """The window of torchmetrics holds these metrics as well."""
    made = batches()
    running = Running(meters.Perplexity(K).to(DEVICE), window=3).to(DEVICE)
    for one in made:
        running.update(one["indices"], one["x"])
    check({"": running.compute()}, {"": expected(made[-3:])["perplexity"]})


def test_nothing_yet():
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert meters.Perplexity(K).compute().isnan()
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert meters.Distortion(window=2).compute().isnan()


@pytest.mark.parametrize("window", [None, 3])
def test_an_update_in_a_graph(window):
    """In one graph with the rest of a step, and once for all steps with torchmetrics' counter told apart."""
    collection = {name: metric.to(DEVICE) for name, metric in everything(window=window).items()}

    def step(one):
        for metric in collection.values():
            metric.update(**{key: one[key] for key in metric._update_signature.parameters})

    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_unspec_int_on_nn_module=True):
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        made = batches(6)
        for one in made[:3]:
            compiled(one)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for one in made[3:]:
                compiled(one)
    check({name: metric.compute() for name, metric in collection.items()}, expected(made[-(window or 99) :]))


def test_errors():
    one = batches(1)[0]
    for call, words in (
        (lambda: meters.Usage(0), "Usage: num_codes must be at least 1; got 0"),
        (lambda: meters.Usage(K, window=0), "Usage: window must be at least 1; got 0"),
        (lambda: meters.PSNR(data_range=-1), "PSNR: data_range must be not negative"),
        (
            lambda: meters.Usage(K, stages=3).update(one["indices"]),
            "Usage: indices must be (..., 3), one per stage; got (12, 2). Pass stages=2.",
        ),
    ):
        with pytest.raises(ValueError) as caught:
            call()
        assert words in str(caught.value)
    # positional arguments of another metric
    with pytest.raises(TypeError, match="indices must be int64"):
        meters.Usage(K).update(one["x"])


def test_without_torchmetrics():
    """vqkernels.nn does not need it; who asks for its classes is told."""
    code = (
        "import sys; sys.modules['torchmetrics'] = None; import vqkernels.nn, vqkernels.nn.metrics\n"
        "try:\n    import vqkernels.nn.meters\n"
        "except ImportError as error:\n    print(error)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.stdout.startswith("vqkernels.nn.meters: torchmetrics must be installed; got "), ran.stderr
    assert ran.stdout.strip().endswith(
        "Run pip install torchmetrics, or use the functions of vqkernels.nn.metrics."
    )


def on_rank(rank, made):
    found = []
    for window in (None, 2):
        collection = MetricCollection(everything(window=window)).to(DEVICE)
        local = meters.Usage(K, window=window, sync_on_compute=False).to(DEVICE)
        for one in made[rank]:
            collection.update(**one)
            local.update(one["indices"], one["x"])
            # in the middle as well: to add up must not change what is kept
            last = collection.compute()
        found.append(({name: value.tolist() for name, value in last.items()}, local.compute().item()))
    return found


def test_two_processes_equal_one():
    """Both ranks find the metrics of all batches, or of the last of both, though one of them has fewer rows."""
    made = [batches(3), batches(3, rows=5)]
    found = two_processes(on_rank, made)
    for number, window in enumerate((None, 2)):
        seen = [mine[-(window or 99) :] for mine in made]
        wanted = expected([*seen[0], *seen[1]])
        for rank in range(2):
            joint, local = found[rank][number]
            check(
                {k: torch.tensor(v, dtype=wanted[k].dtype, device=DEVICE) for k, v in joint.items()}, wanted
            )
            assert local == expected(seen[rank])["usage"].item()
