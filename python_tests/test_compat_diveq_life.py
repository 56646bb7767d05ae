"""The faces of diveq over many iterations: replacement, warm-up, what an evaluation returns, and processes."""

import copy
import logging

import pytest
import torch
from processes import two_processes
from torch.utils.checkpoint import checkpoint

from vqkernels.compat import diveq as faces

peers = pytest.importorskip("diveq")

K, D, Q = 8, 4, 2


def make(name, library=faces, **options):
    args = (K, D, Q) if name.startswith(("Residual", "Product")) else (K, D)
    return getattr(library, name)(*args, allow_warning=False, **options)


def used_codes(face, rows=400, used=(1, 2, 5)):
    """Codes far apart of which some have rows, as many as their number says, and these rows."""
    codes = torch.randn(face.codebook.shape) + 10 * torch.arange(K)[:, None]
    with torch.no_grad():
        face.codebook.copy_(codes)
    first = codes if codes.dim() == 2 else codes[0]
    chosen = torch.tensor(used).repeat_interleave(torch.tensor(used))
    chosen = chosen.repeat(rows // len(chosen) + 1)[:rows]
    return first[chosen] + 0.01 * torch.randn(rows, D), chosen


@pytest.mark.parametrize("name", ["DIVEQ", "DIVEQDetach"])
def test_replacement_counts_rows_and_separates(name):
    face = make(name, replacement_iters=3)
    x, chosen = used_codes(face)
    before = face.codebook.detach().clone()
    rows = torch.bincount(chosen, minlength=K)
    for step in (1, 2):
        face(x)
        assert torch.equal(face.codebook_usage, (step * rows).int()) and torch.equal(face.codebook, before)
    face(x)
    assert not face.codebook_usage.any() and int(face.iter_counter) == 3
    used, dead = rows > 0, rows == 0
    assert torch.equal(face.codebook[used], before[used])
    gap = torch.cdist(face.codebook[dead], before[used]).detach()
    source = before[used][gap.argmin(1)]
    # each feature of a copy moves by normals of 1e-3 of the root mean square: 6 deviations at most
    rms = source.square().mean(1, keepdim=True).sqrt()
    moved = (face.codebook[dead] - source).abs().detach()
    assert (moved > 0).all() and (moved <= 6e-3 * rms).all()


def test_replacement_draws_in_proportion_to_rows():
    face = faces.DIVEQ(3000, 1, replacement_iters=1, discard_threshold=1e-9, allow_warning=False)
    with torch.no_grad():
        face.codebook.copy_(100 + torch.arange(3000.0)[:, None])
    face(torch.tensor([[100.0]] * 3 + [[2000.0]]))
    copies = 2998
    # three in four copies stand by the first code, give or take six standard deviations
    assert abs(int((face.codebook < 150).sum()) - 1 - 0.75 * copies) < 6 * (copies * 3 / 16) ** 0.5


def test_perturbation_and_reset_options():
    face = make("DIVEQ", replacement_iters=1, perturb_eps=0.5)
    x, chosen = used_codes(face)
    face(x)
    dead = torch.bincount(chosen, minlength=K) == 0
    gap = torch.cdist(face.codebook[dead], face.codebook[~dead]).amin(1)
    assert (gap > 0.05).all()
    still = make("DIVEQ", replacement_iters=1, codebook_reset=False)
    x, _ = used_codes(still)
    before = copy.deepcopy(still.state_dict())
    still(x)
    assert all(torch.equal(value, before[key]) for key, value in still.state_dict().items())


@pytest.mark.parametrize("name", ["DIVEQ", "DIVEQDetach", "ResidualDIVEQ", "ProductDIVEQ"])
def test_a_pending_backward_survives_replacement(name):
    face = make(name, replacement_iters=2)
    still = make(name, codebook_reset=False)
    x, _ = (used_codes if name in ("DIVEQ", "DIVEQDetach") else _anywhere)(face)
    still.load_state_dict(face.state_dict())
    grads = []
    for module in (face, still):
        torch.manual_seed(7)
        both = module(x)[0], module(x.flip(0))[0]
        sum((z * z).sum() for z in both).backward()
        grads.append(module.codebook.grad)
    assert torch.equal(*grads) and not torch.equal(face.codebook, still.codebook)


# torch's own, of what crosses from one graph to the next
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_the_backward_of_a_compiled_forward_sees_the_codes_before_a_replacement(monkeypatch):
    face, still = make("DIVEQDetach", replacement_iters=1), make("DIVEQDetach", codebook_reset=False)
    x, _ = used_codes(face)
    still.load_state_dict(face.state_dict())
    # these take long to compile, and have no part in the backward
    for name in ("_advance", "_note"):
        monkeypatch.setattr(face, name, torch.compiler.disable(getattr(face, name)))
    grads = []
    # inductor alone takes a copy for its source
    for module in (still, torch.compile(face)):
        leaf = x.clone().requires_grad_()
        z = module(leaf)[0]
        (z * z).sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)
    torch.testing.assert_close(face.codebook.grad, still.codebook.grad)
    assert not torch.equal(face.codebook, still.codebook)
    torch._dynamo.reset()


def _anywhere(face):
    with torch.no_grad():
        face.codebook.normal_()
        # nobody goes there
        face.codebook[:, 3:] += 1000
    return torch.randn(200, D), None


def test_verbose_goes_to_the_logger(caplog, capsys):
    for verbose in (True, False):
        face = make("DIVEQ", replacement_iters=1, verbose=verbose)
        x, chosen = used_codes(face)
        with caplog.at_level(logging.INFO, "vqkernels"):
            face(x)
        dead = int((torch.bincount(chosen, minlength=K) == 0).sum())
        told = [record.getMessage() for record in caplog.records]
        assert told == ([f"iteration 1: replaced {dead} codes"] if verbose else [])
        caplog.clear()
    assert capsys.readouterr().out == ""


def test_recomputation_counts_once():
    face = make("DIVEQ", replacement_iters=10)
    x, _ = used_codes(face)
    z = checkpoint(lambda x: face(x)[0], x.requires_grad_(), use_reentrant=False)
    z.sum().backward()
    assert int(face.iter_counter) == face.iteration == 1 and int(face.codebook_usage.sum()) == len(x)


def test_the_counter_follows_what_is_loaded():
    face, other = make("SFDIVEQ", skip_iters=9, avg_iters=2), make("SFDIVEQ", skip_iters=9, avg_iters=2)
    for _ in range(4):
        face(torch.randn(16, D))
    other(torch.randn(16, D))
    other.load_state_dict(face.state_dict())
    assert other.iteration == copy.deepcopy(face).iteration == face.double().iteration == 4
    face.iter_counter = torch.full((1,), 7, dtype=torch.int32)
    assert face.iteration == 7
    face.iter_counter.zero_()
    assert face.iteration == 0 and face.warming


@torch.no_grad()
def test_compiled_code_does_not_count_in_its_constants():
    face = make("DIVEQ", replacement_iters=5)
    compiled, x = torch.compile(face, backend="eager"), torch.randn(16, D)
    with torch._dynamo.config.patch(recompile_limit=4, fail_on_recompile_limit_hit=True):
        for _ in range(12):
            _, _, perplexity = compiled(x)
    assert int(face.iter_counter) == 12 and int(face.codebook_usage.sum()) == 2 * len(x)
    # which it would have to leave its graph for
    assert isinstance(perplexity, torch.Tensor) and 1 <= perplexity <= K
    face(x)
    assert face.iteration == 13
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["SFDIVEQ", "SFDIVEQDetach"])
@pytest.mark.parametrize("on_cpu", [False, True])
def test_warm_up_starts_where_the_peer_does(name, on_cpu):
    face, peer = (make(name, lib, skip_iters=6, avg_iters=4, latents_on_cpu=on_cpu) for lib in (faces, peers))
    with torch.no_grad():
        peer.codebook.copy_(face.codebook)
    for step in range(1, 6):
        assert face.warming
        x = torch.randn(4 * K, D)
        z, indices, perplexity = face(x)
        theirs = peer(x)
        assert (
            torch.equal(z, theirs[0]) and torch.equal(indices, theirs[1]) and float(perplexity) == theirs[2]
        )
        if step == 4:
            adopted = type(face).adopt(copy.deepcopy(peer))
            adopted(x_last := torch.randn(4 * K, D))
            both = copy.deepcopy(peer)
            both(x_last)
            _near(adopted.codebook, both.codebook)
    _near(face.codebook, peer.codebook)
    assert not face.warming and not face._means and int(face.iter_counter) == 5
    z, indices, _ = face(x)
    assert not torch.equal(z, x) and int(face.iter_counter) == 6 and indices.max() < K - 1


def _near(ours, theirs):
    # means of 16 latents of size 5 at most, added up in another order
    assert (ours - theirs).abs().max() <= 16 * 5 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("name", ["ResidualSFDIVEQ", "ProductSFDIVEQ"])
def test_several_codebooks_really_start(name):
    face = make(name, skip_iters=4, avg_iters=2, replacement_iters=4)
    peer = make(name, peers, skip_iters=4, avg_iters=2, replacement_iters=4)
    with torch.no_grad():
        face.codebook.normal_()
    peer.load_state_dict(face.state_dict())
    start = face.codebook.detach().clone()
    seen = []
    for _ in range(3):
        x = torch.randn(4 * K, D)
        _, indices, _ = face(x)
        assert all(torch.equal(a, b) for a, b in zip(indices, peer(x)[1], strict=True))
        residual = name == "ResidualSFDIVEQ"
        seen.append([x, x - start[0, indices[0]]] if residual else list(x.split(D // Q, 1)))
    assert torch.equal(peer.codebook, start)
    for q in range(Q):
        latents = torch.cat([step[q] for step in seen[1:]])
        _near(face.codebook[q], latents.view(K, -1, latents.shape[1]).mean(1))
    assert not face._means
    z, indices, _ = face(x)
    assert z.isfinite().all() and all(index.max() < K - 1 for index in indices)


def test_few_latents_start_along_their_line():
    face = faces.SFDIVEQ(K, 1, skip_iters=3, avg_iters=1, allow_warning=False)
    for _ in range(2):
        face(torch.tensor([[0.0], [7.0], [torch.nan]]))
    assert torch.equal(face.codebook, torch.arange(8.0)[:, None])
    with pytest.warns(UserWarning, match="unusual"):
        told = faces.SFDIVEQ(K, 1, skip_iters=2, avg_iters=1)
    with pytest.warns(UserWarning, match="avg_iters=1 iterations brought 2 finite latents for 8 codes"):
        told(torch.tensor([[0.0], [7.0]]))
    none = make("SFDIVEQ", skip_iters=2, avg_iters=0)
    before = none.codebook.detach().clone()
    none(torch.randn(5, D))
    assert torch.equal(none.codebook, before) and not none.warming


def test_batches_of_other_sizes_and_resumed_warm_ups_start():
    face = make("SFDIVEQ", skip_iters=6, avg_iters=4)
    for rows in (50, 50, 50, 7, 0, 30):
        face(torch.randn(rows, D))
    assert face.codebook.isfinite().all() and len(face.codebook.unique(dim=0)) == K
    resumed = make("SFDIVEQ", skip_iters=6, avg_iters=4)
    resumed.iter_counter = torch.full((1,), 3, dtype=torch.int32)
    for _ in range(2):
        resumed(torch.randn(50, D))
    assert not resumed.warming and len(resumed.codebook.unique(dim=0)) == K


@pytest.mark.parametrize("name", ["SFDIVEQ", "ResidualSFDIVEQ", "ProductSFDIVEQ"])
def test_inference_is_nearest_on_the_curve(name):
    options = {"skip_iters": 1, "avg_iters": 0} | ({} if name == "SFDIVEQ" else {"replacement_iters": 1})
    face, peer = make(name, **options), make(name, peers, **options)
    with torch.no_grad():
        face.codebook.normal_()
    peer.load_state_dict(face.state_dict())
    x = torch.randn(500, D)
    (z, indices, _), theirs = face.inference(x), peer.inference(x)
    if name != "ResidualSFDIVEQ":
        assert all(torch.equal(a, b) for a, b in zip(_list(indices), _list(theirs[1]), strict=True))
        ours, peers_own = ((x - y).double().norm(dim=1) for y in (z, theirs[0]))
        # a position and an interpolation round a few times, for each of D features
        slack = 8 * D * torch.finfo(torch.float32).eps * (x.norm(dim=1).max() + z.norm(dim=1).max())
        assert (ours <= peers_own + slack).all() and (ours < peers_own - slack).any()
    face.evaluation = "codeword"
    z, indices, _ = face.eval()(x)
    codes = [face.codebook] if name == "SFDIVEQ" else face.codebook.unbind(0)
    points = [code[index] for code, index in zip(codes, _list(indices), strict=True)]
    decoded = torch.cat(points, 1) if name == "ProductSFDIVEQ" else sum(points)
    assert torch.equal(z, decoded)
    with pytest.raises(ValueError, match="evaluation must be one of 'curve', 'codeword'"):
        face.evaluation = "exact"


def _list(value):
    return value if isinstance(value, list) else [value]


def test_codes_that_coincide_or_are_two():
    face = faces.SFDIVEQ(2, D, skip_iters=0, avg_iters=0, allow_warning=False)
    x = torch.randn(20, D)
    assert face.inference(x)[0].isfinite().all() and face(x)[0].isfinite().all()
    with torch.no_grad():
        face.codebook.fill_(1.0)
    assert torch.equal(face.inference(x)[0], torch.ones(20, D))
    with pytest.raises(ValueError, match="num_embeddings must be at least 2"):
        faces.SFDIVEQ(1, D)


def train(batches, rank):
    """Codes and counts after some forwards of each kind."""
    found = {}
    for name in ("DIVEQ", "SFDIVEQ", "ResidualSFDIVEQ"):
        torch.manual_seed(3)
        options = {"replacement_iters": 2} if name != "SFDIVEQ" else {}
        options |= {"skip_iters": 4, "avg_iters": 2} if "SF" in name else {"discard_threshold": 0.5}
        face = make(name, **options)
        torch.manual_seed(40 + rank)
        outputs = [face(x.clone()) for x in batches]
        found[name] = [value.detach() for value in face.state_dict().values()], outputs[-1][0].detach()
    return found


def on_rank(rank, batches):
    return train([x.chunk(2)[rank] for x in batches], rank)


def test_two_processes_equal_one():
    batches = torch.randn(5, 8 * K, D).unbind(0)
    ranks = two_processes(on_rank, batches)
    whole = train(batches, 0)
    # sums of the ranks are added in another order than those of one process
    bound = 64 * 5 * torch.finfo(torch.float32).eps
    for name, (state, z) in whole.items():
        for first, second, one in zip(ranks[0][name][0], ranks[1][name][0], state, strict=True):
            assert torch.equal(first, second)
            if one.is_floating_point():
                assert (first - one).abs().max() <= bound
            else:
                assert torch.equal(first, one)
        found = torch.cat([ranks[0][name][1], ranks[1][name][1]])
        # an output moves with its two codes, in length and in direction, by sqrt(D) times as much as a feature
        assert (found - z).abs().max() <= 4 * D**0.5 * bound


@pytest.mark.parametrize("name", ["DIVEQ", "SFDIVEQ", "ResidualDIVEQ", "ProductSFDIVEQ"])
def test_a_row_that_is_not_finite_touches_no_other(name):
    options = {"skip_iters": 1, "avg_iters": 0} if "SF" in name else {}
    face = make(name, **options, **({"replacement_iters": 1} if name == "ProductSFDIVEQ" else {}))
    x = torch.randn(20, D)
    x[3, 1] = torch.nan
    z, indices, _ = face(x)
    finite = torch.arange(20) != 3
    assert z[3].isnan().all() and z[finite].isfinite().all()
    z[finite].sum().backward()
    assert face.codebook.grad.isfinite().all() and int(_list(indices)[0][3]) == 0
    if "SF" not in name:
        assert int(face.codebook_usage.sum()) == 19 * len(_list(indices))
