"""convert on live models of vector-quantize-pytorch and diveq, and the list of all that it knows."""

import copy
import importlib
import io
import math
import pickle
import pkgutil
import sys
import warnings

import pytest
import torch
from processes import two_processes
from torch import nn

import vqkernels.compat
from vqkernels import convert
from vqkernels.compat.face import Face
from vqkernels.compat.registry import _FACES, face_of, qualified

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    library = pytest.importorskip("vector_quantize_pytorch")
    diveq = pytest.importorskip("diveq")

D, K = 16, 64
QUIET = {"allow_warning": False}
CASES = {
    "ema": lambda: library.VectorQuantize(D, K),
    "projected": lambda: library.VectorQuantize(D, K, codebook_dim=4),
    "cosine": lambda: library.VectorQuantize(D, K, use_cosine_sim=True),
    "heads": lambda: library.VectorQuantize(D, K, heads=2, codebook_dim=8, separate_codebook_per_head=True),
    "learnable": lambda: library.VectorQuantize(D, K, learnable_codebook=True, ema_update=False),
    "residual": lambda: library.ResidualVQ(dim=D, num_quantizers=3, codebook_size=K),
    "grouped": lambda: library.GroupedResidualVQ(dim=D, num_quantizers=2, groups=2, codebook_size=K),
    "simvq": lambda: library.SimVQ(D, K),
    "fsq": lambda: library.FSQ([8, 5, 5], dim=D),
    "lfq": lambda: library.LFQ(dim=D, codebook_size=K),
    "DIVEQ": lambda: diveq.DIVEQ(K, D),
    "DIVEQDetach": lambda: diveq.DIVEQDetach(K, D),
    "SFDIVEQ": lambda: diveq.SFDIVEQ(K, D, **QUIET),
    "ResidualDIVEQ": lambda: diveq.ResidualDIVEQ(K, D, 3),
    "ResidualSFDIVEQ": lambda: diveq.ResidualSFDIVEQ(K, D, 3, **QUIET),
    "ProductDIVEQ": lambda: diveq.ProductDIVEQ(K, D, 2),
}


class Model(nn.Module):
    """A quantizer between two layers; the sum of what it returns that is a loss."""

    def __init__(self, name):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(D, D), nn.Linear(D, D)
        self.quantizer = CASES[name]()
        # started codes, where the constructor leaves them for later
        for tensor in (*self.quantizer.parameters(), *self.quantizer.buffers()):
            if tensor.dim() >= 2 and tensor.is_floating_point():
                tensor.data.normal_(std=0.5)

    def forward(self, x):
        result = self.quantizer(self.encoder(x))
        losses = [part for part in result[2:] if isinstance(part, torch.Tensor) and part.requires_grad]
        return self.decoder(result[0]), sum(loss.sum() for loss in losses)


def rows(name, count=300):
    flat = name.endswith(("DIVEQ", "Detach"))
    return torch.randn(count, D) if flat else torch.randn(count // 50, 50, D)


def step(model, x):
    out, loss = model(x)
    return (out - x).square().mean() + loss


@pytest.fixture(params=CASES)
def name(request):
    return request.param


def test_same_indices_and_outputs(name):
    model, x = Model(name), rows(name)
    state = copy.deepcopy(model.state_dict())
    before = {key: tensor for key, tensor in (*model.named_parameters(), *model.named_buffers())}
    generator = torch.get_rng_state()
    report = convert(model, verify=x)
    assert torch.equal(generator, torch.get_rng_state())
    assert report.verified and not report.left, str(report)
    (check,) = report.checks
    assert check.rows == 300 and check.ours_farther == 0
    assert type(model.quantizer).__module__.startswith("vqkernels.compat.")
    after = {key: tensor for key, tensor in (*model.named_parameters(), *model.named_buffers())}
    assert before.keys() == after.keys() and all(before[key] is after[key] for key in before)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert not convert(model).rows


def test_state_dicts_go_both_ways(name):
    model = Model(name)
    peer = Model(name)
    convert(model)
    assert list(model.state_dict()) == list(peer.state_dict())
    peer.load_state_dict(model.state_dict())
    model.load_state_dict(Model(name).state_dict())


def test_copies(name):
    model, x = Model(name).eval(), rows(name)
    convert(model)
    with torch.no_grad():
        out = model(x)[0]
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=False)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
            assert torch.equal(other(x)[0], out)


# peers whose training forward draws nothing at random
STEADY = ["ema", "projected", "cosine", "learnable", "residual", "grouped", "simvq", "fsq", "DIVEQDetach"]


@pytest.mark.parametrize("name", STEADY)
def test_the_first_loss_is_the_same_and_training_goes_on(name):
    model, x = Model(name), rows(name)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    first = step(model, x)
    first.backward()
    optimizer.step()
    optimizer.zero_grad()
    moments = {parameter: state["exp_avg"] for parameter, state in optimizer.state.items()}
    twin = copy.deepcopy(model)
    convert(model)
    losses = []
    for number in range(5):
        total = step(model, x)
        if number == 0:
            theirs = step(twin, x).item()
            # codes are the same, outputs and losses sums of products of D features, summed over all
            terms = D + math.log2(x.numel()) + 2
            assert abs(total.item() - theirs) <= terms * torch.finfo(torch.float32).eps * max(1.0, theirs)
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total.item())
    assert losses[-1] < losses[0] < first.item()
    for parameter, moment in moments.items():
        assert (
            optimizer.state[parameter]["exp_avg"] is moment and int(optimizer.state[parameter]["step"]) == 6
        )


def nearest(x, codes):
    """Brute force in float64."""
    codes = codes.double()
    parts = (
        torch.cdist(p.double(), codes, compute_mode="donot_use_mm_for_euclid_dist") for p in x.split(20000)
    )
    return torch.cat([part.argmin(-1) for part in parts])


def test_far_from_the_origin_only_the_peer_errs():
    """10^5 rows of mean 100 and spread 0.1, where a float32 product leaves few digits of a distance."""
    model, x = nn.Sequential(library.VectorQuantize(32, 128)), 100 + 0.1 * torch.randn(1, 100_000, 32)
    codes = model[0]._codebook.embed
    codes.normal_().mul_(0.1).add_(100)
    right = nearest(x[0], codes[0])
    model.eval()
    with torch.no_grad():
        theirs = model(x)[1][0]
        report = convert(model, verify=x)
        assert torch.equal(model(x)[1][0], right)
    wrong = int((theirs != right).sum())
    (check,) = report.checks
    assert wrong > 50_000
    assert (check.rows, check.differing, check.peer_farther, check.ties) == (100_000, wrong, wrong, 0)


def test_usual_rows_differ_where_the_peer_errs():
    model, x = nn.Sequential(diveq.DIVEQ(K, D)), torch.randn(100_000, D)
    model[0].codebook.data.normal_()
    theirs, right = model[0].inference(x)[1], nearest(x, model[0].codebook.detach())
    (check,) = convert(model, verify=x).checks
    assert torch.equal(model.eval()(x)[1], right)
    assert check.differing == int((theirs != right).sum()) == check.peer_farther < 100
    assert check.rows == 100_000


def test_moments_that_move_in_eval_mode():
    """The peer's moments follow rows in eval mode too; a face in that state picks the same codes."""
    model, x = nn.Sequential(library.VectorQuantize(D, K, affine_param=True)), 100 + torch.randn(1, 300, D)
    report = convert(model, verify=x)
    assert report.verified and "changes its state in eval mode" in report.checks[0].notes[0]


def test_rows_that_are_not_finite():
    model, x = Model("ema"), rows("ema")
    model.encoder = nn.Identity()
    x[0, 3] = torch.nan
    x[1, 4, 5] = torch.inf
    assert convert(model, verify=x).verified


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["ema", "learnable", "residual", "simvq", "fsq"])
def test_half_precision(name, dtype):
    model, x = Model(name), rows(name)
    model.encoder, model.decoder = nn.Identity(), nn.Identity()
    codes = {key: value.clone() for key, value in model.state_dict().items()}
    model.quantizer.to(dtype)
    report = convert(model, verify=x.to(dtype))
    assert report.verified, str(report)
    out = model.eval()(x.to(dtype))[0]
    assert out.dtype == dtype and out.isfinite().all()
    assert all(value.dtype in (dtype, codes[key].dtype) for key, value in model.state_dict().items())


def test_curves_after_the_warm_up_are_nearer():
    model, x = nn.Sequential(diveq.SFDIVEQ(K, D, **QUIET)), torch.randn(500, D)
    model[0].iter_counter += 2000
    model[0].codebook.data.normal_()
    report = convert(model, verify=x)
    assert report.verified and "of the peer" in report.checks[0].notes[0]


def test_what_stays():
    fsq = library.ResidualFSQ(dim=D, levels=[5, 5], num_quantizers=2)
    neural = library.ResidualVQ(dim=D, num_quantizers=2, codebook_size=8, implicit_neural_codebook=True)
    model = nn.ModuleDict({"fsq": fsq, "neural": neural, "vq": library.VectorQuantize(D, K)})
    report = convert(model)
    assert model["fsq"] is fsq and model["neural"] is neural and len(report.converted) == 1
    reasons = {row.paths[0]: row.reason for row in report.left}
    assert "works with this class alone" in reasons["fsq.layers.0"]
    assert "implicit_neural_codebook" in reasons["neural"]
    assert max(map(len, str(report).splitlines())) <= 100


def test_meta():
    with torch.device("meta"):
        model = nn.ModuleList([diveq.DIVEQ(K, D), library.VectorQuantize(D, K)])
    report = convert(model)
    for row in report.left:
        assert "it is on the meta device" in row.reason
    assert report.converted[0].paths == ("0",) and model[0].codebook.is_meta


class Both(nn.Module):
    """Two models on the same rows, and one loss."""

    def __init__(self):
        super().__init__()
        self.one, self.two = Model("ema"), Model("DIVEQDetach")

    def forward(self, x):
        return step(self.one, x[None]) + step(self.two, x)


def on_rank(rank):
    """Gradients, codes and counts after three steps under DDP, on other rows on each rank."""
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(Both())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for number, x in enumerate(torch.randn(3, 2, 64, D)[:, rank]):
        if number == 1:
            assert convert(model, verify=x).verified
            assert not convert(model).rows
        optimizer.zero_grad()
        model(x).backward()
        optimizer.step()
    return [*(p.grad for p in model.parameters()), *model.state_dict().values()]


def test_ddp():
    ranks = two_processes(on_rank)
    for first, second in zip(*ranks):
        assert torch.equal(first, second)
    assert all(tensor.abs().sum() > 0 for tensor in ranks[0] if tensor.dim() == 2)


def test_every_face_is_known_by_every_name():
    found = {}
    for module in pkgutil.walk_packages(vqkernels.compat.__path__, "vqkernels.compat."):
        importlib.import_module(module.name)
    waiting = list(Face.__subclasses__())
    while waiting:
        kind = waiting.pop()
        waiting += kind.__subclasses__()
        if kind.__module__.startswith("vqkernels."):
            found |= dict.fromkeys(kind.peers, kind)
    known = {name: face_of(name) for name, face in _FACES.items() if isinstance(face, tuple)}
    assert known == found


def test_names_are_those_of_the_installed_libraries():
    for name in _FACES:
        module, _, kind = name.rpartition(".")
        if name.startswith(("vector_quantize_pytorch.", "diveq.")) and module != "diveq":
            assert qualified(getattr(importlib.import_module(module), kind)) == name
    assert "vqtorch" not in sys.modules and "taming" not in sys.modules
