"""The faces of diveq beside the installed package: options, states, indices, outputs, gradients."""

import inspect
import warnings

import pytest
import torch

from vqkernels.compat import diveq as faces
from vqkernels.nn._random import draw_seed, split_seed
from vqkernels.ops.philox import dither

peers = pytest.importorskip("diveq")

N, K, D, Q = 300, 16, 8, 2
EPS = torch.finfo(torch.float64).eps
SINGLE = ["DIVEQ", "DIVEQDetach", "SFDIVEQ", "SFDIVEQDetach"]
SEVERAL = ["ResidualDIVEQ", "ProductDIVEQ", "ResidualSFDIVEQ", "ProductSFDIVEQ"]
CURVES = [name for name in SINGLE + SEVERAL if "SF" in name]


def pair(name, *, dtype=torch.float32, **options):
    """The peer and a face with the same codes, none of them near another."""
    if name in CURVES:
        # the first forward is the first one on the curve
        options = {"skip_iters": 1, "avg_iters": 0} | options
        options = options | ({"replacement_iters": 1} if name in SEVERAL else {})
    options["allow_warning"] = False
    args = (K, D, Q) if name in SEVERAL else (K, D)
    peer = getattr(peers, name)(*args, **options).to(dtype)
    with torch.no_grad():
        peer.codebook.copy_(torch.randn(peer.codebook.shape))
    face = getattr(faces, name)(*args, **options).to(dtype)
    face.load_state_dict(peer.state_dict())
    return peer, face


def stacked(indices):
    return torch.stack(indices, -1) if isinstance(indices, list) else indices


def run(module, x, g):
    """Output, indices and both gradients of one training forward."""
    module.codebook.grad = None
    x = x.clone().requires_grad_()
    z, indices, _ = module(x)
    z.backward(g)
    return z.detach(), stacked(indices), x.grad, module.codebook.grad


@pytest.mark.parametrize("name", SINGLE + SEVERAL)
def test_keywords_and_first_codes(name):
    def told(cls):
        return [(p.name, p.default) for p in inspect.signature(cls).parameters.values()]

    peer_class, face_class = getattr(peers, name), getattr(faces, name)
    assert told(peer_class) == told(face_class)
    args = (K, D, Q) if name in SEVERAL else (K, D)
    for uniform in (True, False):
        made = []
        for cls in (peer_class, face_class):
            torch.manual_seed(1)
            made.append(cls(*args, uniform_init=uniform))
        assert torch.equal(made[0].codebook, made[1].codebook)
        assert repr(made[0]) == repr(made[1])


@pytest.mark.parametrize("name", SINGLE + SEVERAL)
def test_state_both_ways_and_adoption(name):
    peer, face = pair(name)
    for _ in range(3):
        peer(torch.randn(N, D))
    theirs = peer.state_dict()
    assert list(theirs) == list(face.state_dict())
    face.load_state_dict(theirs)
    assert face.iteration == int(peer.iter_counter)
    for key, value in face.state_dict().items():
        assert value.dtype == theirs[key].dtype and torch.equal(value, theirs[key])
    peer.load_state_dict(face.state_dict())
    adopted = type(face).adopt(peer.eval())
    assert adopted.codebook is peer.codebook and not adopted.training
    assert all(ours is theirs for ours, theirs in zip(adopted.buffers(), peer.buffers(), strict=True))
    assert repr(adopted) == repr(peer) and f"diveq.{_module(peer)}" in adopted.peers


def _module(peer):
    return f"{type(peer).__module__.split('.')[-1]}.{type(peer).__name__}"


@pytest.mark.parametrize("name", [name for name in SINGLE + SEVERAL if "SF" not in name])
@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_indices_are_nearest(name, mean):
    peer, face = pair(name)
    with torch.no_grad():
        peer.codebook.mul_(0.1).add_(mean if name != "ResidualDIVEQ" else 0)
    face.load_state_dict(peer.state_dict())
    x = mean + 0.1 * torch.randn(N, D)
    ours, theirs = (stacked(module.inference(x)[1]) for module in (face, peer))
    d_ours, d_theirs = face.sq_dist_of(x, ours), face.sq_dist_of(x, theirs)
    first = ours[:, :1] == theirs[:, :1] if ours.dim() == 2 else torch.ones_like(ours, dtype=torch.bool)
    # what a second stage quantizes is the same where the first agree
    assert bool((d_ours <= d_theirs)[first.expand(ours.shape) | (name == "ProductDIVEQ")].all())
    if mean == 0:
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["DIVEQ", "ResidualDIVEQ", "ProductDIVEQ"])
def test_noise_turns_the_error_and_keeps_its_length(name):
    peer, face = pair(name, noise_var=0.01, dtype=torch.float64)
    x = torch.randn(N, D, dtype=torch.float64)
    hard, indices, perplexity = face.inference(x)
    theirs = peer.inference(x)
    assert torch.equal(hard, theirs[0]) and torch.equal(stacked(indices), stacked(theirs[1]))
    z, trained, _ = face(x)
    assert torch.equal(stacked(trained), stacked(indices)) and not torch.equal(z, hard)
    # the norms of D terms round D times each
    length = (hard - x).norm(dim=1)
    assert ((z - x).norm(dim=1) - length).abs().max() <= 4 * D * EPS * (x.norm(dim=1) + length).max()
    # the standard deviation is noise_var: that of the part across the error, of D - 1 features
    e = (hard - x) / length[:, None]
    turned = (z - x) / ((z - x) * e).sum(1, keepdim=True) - e
    noise = (turned.detach() * length[:, None]).square().sum(1).mean().div(D - 1).sqrt()
    # six standard deviations of an estimate from so many normals
    assert abs(float(noise) / 0.01 - 1) < 6 / (2 * N * (D - 1)) ** 0.5
    for ours, peers_own in zip(_list(perplexity), _list(theirs[2]), strict=True):
        # as there, so that what is written to a log of numbers can be written
        assert type(ours) is type(peers_own) is float and f"{ours:.2f}" == f"{peers_own:.2f}"


def _list(value):
    return value if isinstance(value, list) else [value]


@pytest.mark.parametrize("name", [name for name in SINGLE + SEVERAL if "SF" not in name])
def test_gradients_are_those_of_the_peer(name):
    # noise too small for any bit of a result
    noise = {} if "Detach" in name else {"noise_var": 1e-25}
    peer, face = pair(name, dtype=torch.float64, **noise)
    x, g = torch.randn(2, N, D, dtype=torch.float64)
    _agree(run(face, x, g), run(peer, x, g), x, g)


@pytest.mark.parametrize("name", [name for name in CURVES if "Detach" not in name])
def test_curve_gradients_are_those_of_the_peer(name, monkeypatch):
    peer, face = pair(name, dtype=torch.float64, noise_var=1e-25)
    x, g = torch.randn(2, N, D, dtype=torch.float64)
    torch.manual_seed(5)
    seed = draw_seed(x.device)
    seeds = iter(split_seed(seed, Q) if name in SEVERAL else [seed])

    def dithered(*args):
        at = dither(next(seeds), K)[:, None].double()
        codes = args[1] if len(args) == 2 else peer.codebook
        return (1 - at) * codes[:-1] + at * codes[1:], at

    monkeypatch.setattr(peer, "_generate_dithered_codebook", dithered)
    torch.manual_seed(5)
    _agree(run(face, x, g), run(peer, x, g), x, g)


def test_detached_curve_interpolates():
    _, face = pair("SFDIVEQDetach", dtype=torch.float64)
    x = torch.randn(N, D, dtype=torch.float64)
    torch.manual_seed(5)
    at = dither(draw_seed(x.device), K).double()
    torch.manual_seed(5)
    z, segments, _ = face(x)
    points = (1 - at)[:, None] * face.codebook[:-1] + at[:, None] * face.codebook[1:]
    assert torch.equal(segments, torch.cdist(x, points.detach()).argmin(1))
    assert (z - points[segments]).abs().max() <= 4 * EPS * face.codebook.abs().max()


def _agree(ours, theirs, x, g):
    assert torch.equal(ours[1], theirs[1])
    size = x.norm(dim=1).max() + theirs[0].norm(dim=1).max()
    least = (theirs[0] - x).norm(dim=1).min()
    # a norm, a product and a sum over D features, some of them twice, and the 1e-12 that the peer adds to a length;
    # the codes' gradient adds at most N rows
    bound = 16 * D * EPS
    assert (ours[0] - theirs[0]).abs().max() <= bound * size + 1e-12
    bound += 1e-12 / least
    assert (ours[2] - theirs[2]).abs().max() <= bound * g.norm(dim=1).max()
    assert (ours[3] - theirs[3]).abs().max() <= bound * g.norm(dim=1).sum()


@pytest.mark.parametrize("name", SINGLE + SEVERAL)
def test_eval_forward_is_inference_with_a_gradient(name):
    _, face = pair(name)
    for _ in range(2):
        face(torch.randn(N, D))
    state = {key: value.clone() for key, value in face.state_dict().items()}
    x = torch.randn(N, D)
    draws = torch.get_rng_state()
    hard, *_ = face.eval().inference(x)
    z, *_ = run(face, x, torch.ones(N, D))
    assert torch.equal(z, hard) and not hard.requires_grad and face.codebook.grad.abs().sum() > 0
    assert torch.equal(torch.get_rng_state(), draws)
    assert all(torch.equal(value, state[key]) for key, value in face.state_dict().items())


@pytest.mark.parametrize("name", ["DIVEQ", "SFDIVEQ", "ResidualSFDIVEQ", "ProductDIVEQ"])
def test_refusals_and_warnings(name):
    cls = getattr(faces, name)
    args = (K, D, Q) if name in SEVERAL else (K, D)
    with pytest.raises(ValueError, match="noise_var must be above 0"):
        cls(*args, noise_var=0.0)
    with pytest.raises(ValueError, match=rf"{name}: z must be \(N, {D}\)"):
        cls(*args)(torch.randn(2, 3, D))
    with pytest.warns(UserWarning, match="noise_var=0.5 is unusual"):
        cls(*args, noise_var=0.5)
    if "SF" in name:
        with pytest.raises(ValueError, match="avg_iters must be at most skip_iters"):
            cls(*args, skip_iters=120, avg_iters=121)
    if name == "ProductDIVEQ":
        with pytest.raises(ValueError, match="embedding_dim must divide by 3"):
            cls(K, D, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cls(*args, noise_var=0.5, allow_warning=False)


def test_half_inputs_search_exactly():
    peer, face = pair("DIVEQ")
    x = torch.randn(N, D).bfloat16()
    z, indices, _ = face.inference(x)
    assert z.dtype == torch.bfloat16 and face.codebook.dtype == torch.float32
    assert torch.equal(indices, peer.inference(x.float())[1])
