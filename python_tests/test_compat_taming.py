"""The faces of taming-transformers against their equations in float64, and against stand-ins for the live modules."""

import inspect
import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from vqkernels.compat.taming import GumbelQuantize, VectorQuantizer, VectorQuantizer2
from vqkernels.ops.gumbel_code import gumbel_noise
from vqkernels.testing import DEVICE

D, K, HIDDEN = 8, 24, 6
EPS = torch.finfo(torch.float64).eps
USED = torch.tensor([3, 17, 1, 9, 22])


def latents(*shape):
    return torch.randn(*shape, device=DEVICE, dtype=torch.float64)


def spread(face):
    """A face in float64 with codes as far apart as latents are."""
    face = face.to(DEVICE).double()
    nn.init.normal_((face.embed if isinstance(face, GumbelQuantize) else face.embedding).weight)
    return face


def gradients(face, z, run):
    z = z.clone().requires_grad_()
    face.zero_grad()
    out, loss = run(z)
    weights = torch.linspace(-1, 2, out.numel(), device=DEVICE, dtype=torch.float64).view(out.shape)
    ((out * weights).sum() + 7 * loss).backward()
    return [z.grad, *(parameter.grad for parameter in face.parameters())]


def by_distance(face, z, on_latents, on_codes):
    """Straight through to the nearest code, and the two squared errors."""
    rows, weight = z.movedim(1, -1), face.embedding.weight
    indices = (rows.detach()[..., None, :] - weight.detach()).square().sum(-1).argmin(-1)
    codes = weight[indices]
    loss = (
        on_latents * (rows - codes.detach()).square().mean()
        + on_codes * (rows.detach() - codes).square().mean()
    )
    return (rows + (codes - rows).detach()).movedim(-1, 1), loss, indices


@pytest.mark.parametrize("legacy", [None, True, False])
def test_codes_by_distance_are_their_equations(legacy):
    if legacy is None:
        face = spread(VectorQuantizer(K, D, 0.25))
    else:
        face = spread(VectorQuantizer2(K, D, 0.25, legacy=legacy))
    weights = (0.25, 1.0) if legacy is False else (1.0, 0.25)
    z = latents(2, D, 3, 5)
    out, loss, (_, _, indices) = face(z)
    want, error, nearest = by_distance(face, z, *weights)
    assert torch.equal(indices.view(nearest.shape), nearest)
    assert indices.shape == ((30, 1) if legacy is None else (30,))
    assert out.is_contiguous()
    torch.testing.assert_close(out, want, rtol=0, atol=10 * EPS * 10)
    torch.testing.assert_close(loss, error, rtol=0, atol=100 * EPS)
    found = gradients(face, z, lambda x: face(x)[:2])
    expected = gradients(face, z, lambda x: by_distance(face, x, *weights)[:2])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1000 * EPS)
    distance = face.sq_dist_of(z, indices)
    least = (z.movedim(1, -1)[..., None, :] - face.embedding.weight).square().sum(-1).amin(-1)
    torch.testing.assert_close(distance.flatten(), least.flatten(), rtol=0, atol=100 * D * EPS)


def test_the_first_quantizer_returns_perplexity_and_encodings_without_a_matrix():
    face = spread(VectorQuantizer(K, D, 0.25))
    z = latents(2, D, 3, 5)
    z_q, _, (perplexity, encodings, indices) = face(z)
    one_hot = nn.functional.one_hot(indices[:, 0], K).double()
    share = one_hot.mean(0)
    torch.testing.assert_close(perplexity, (-(share * (share + 1e-10).log()).sum()).exp(), rtol=1e-12, atol=0)
    assert encodings.layout == torch.sparse_coo
    assert torch.equal(encodings.to_dense(), one_hot)
    codes = (encodings @ face.embedding.weight).view(2, 3, 5, D).movedim(-1, 1)
    torch.testing.assert_close(codes, z_q, rtol=0, atol=10 * EPS)
    assert torch.equal(face.get_codebook_entry(indices[:, 0], (2, 3, 5, D)), z_q)
    assert torch.equal(face.get_codebook_entry(indices[:, 0], None), face.embedding.weight[indices[:, 0]])


def test_codes_far_from_zero_are_the_nearest_in_every_dtype():
    face = VectorQuantizer2(K, D, 0.25, sane_index_shape=True).to(DEVICE)
    nn.init.normal_(face.embedding.weight, mean=100, std=0.1)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        z = (100 + 0.1 * latents(2, D, 7, 7)).to(dtype)
        z_q, loss, (_, _, indices) = face(z)
        exact = (z.double().movedim(1, -1)[..., None, :] - face.embedding.weight.double()).square().sum(-1)
        assert torch.equal(indices, exact.argmin(-1))
        assert z_q.dtype == loss.dtype == torch.float32


@pytest.mark.parametrize("unknown", ["random", "extra", 2])
@pytest.mark.parametrize("sane", [True, False])
def test_indices_become_places_among_the_used_codes(tmp_path, unknown, sane):
    numpy = pytest.importorskip("numpy")
    numpy.save(tmp_path / "used.npy", USED.numpy())
    options = {"unknown_index": unknown, "sane_index_shape": sane}
    face = spread(VectorQuantizer2(K, D, 0.25, remap=str(tmp_path / "used.npy"), **options))
    plain = spread(VectorQuantizer2(K, D, 0.25, sane_index_shape=True))
    plain.load_state_dict({"embedding.weight": face.embedding.weight})
    assert face.state_dict().keys() == {"embedding.weight", "used"}
    assert face.re_embed == 5 + (unknown == "extra")
    z = latents(4, D, 6, 6)
    z_q, _, (_, _, places) = face(z)
    indices = plain(z)[2][2]
    assert places.shape == ((4, 6, 6) if sane else (144, 1))
    same = USED.to(DEVICE) == indices.flatten()[:, None]
    known, at = same.any(1), same.int().argmax(1)
    assert known.any()
    assert not known.all()
    assert torch.equal(places.flatten()[known], at[known])
    others = places.flatten()[~known]
    if unknown == "random":
        assert others.amin() >= 0
        assert others.amax() < 5
        assert len(others.unique()) > 1
    else:
        assert (others == (5 if unknown == "extra" else unknown)).all()
    kept = places.clone()
    entry = face.get_codebook_entry(places, (4, 6, 6, D))
    assert torch.equal(places, kept)
    rows, want = entry.movedim(1, -1).flatten(0, 2), z_q.movedim(1, -1).flatten(0, 2)
    assert torch.equal(rows[known], want[known])
    if unknown == "extra":
        assert (rows[~known] == face.embedding.weight[3]).all()
    distance = face.sq_dist_of(z, places).flatten()
    least = (z.movedim(1, -1)[..., None, :] - face.embedding.weight).square().sum(-1).amin(-1).flatten()
    # a place that was drawn for an unknown code says nothing of that code
    told = known if unknown == "random" else torch.ones_like(known)
    torch.testing.assert_close(distance[told], least[told], rtol=0, atol=100 * D * EPS)
    other = face.sq_dist_of(z, (places + 1) % 5).flatten()
    assert (other[known] > least[known]).all()


def drawn(face, z, noise, hard):
    """Gumbel-softmax of all logits at once."""
    logits = nn.functional.conv2d(z, face.proj.weight, face.proj.bias).movedim(1, -1)
    codes = face.embed.weight
    if face.remap is not None:
        logits, codes = logits[..., face.used], codes[face.used]
    q = logits.softmax(-1)
    loss = face.kl_weight * (q * (q * K).log()).sum(-1).mean()
    y = ((logits + noise) / face.temperature).softmax(-1)
    indices = y.argmax(-1)
    if hard:
        y = nn.functional.one_hot(indices, len(codes)) + y - y.detach()
    return (y @ codes).movedim(-1, 1), loss, indices


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("straight_through", [True, False])
@pytest.mark.parametrize("remap", [None, USED])
def test_codes_by_logits_are_their_equations(training, straight_through, remap):
    options = {"kl_weight": 0.3, "temp_init": 0.7, "straight_through": straight_through, "remap": remap}
    face = spread(GumbelQuantize(HIDDEN, D, K, **options)).train(training)
    z = latents(2, HIDDEN, 3, 5)
    noise = 0.0
    if training:
        torch.manual_seed(5)
        seed = torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=DEVICE)
        noise = gumbel_noise(seed, 30, K if remap is None else 5, 0, torch.float64).view(2, 3, 5, -1)
    hard = straight_through or not training

    def again(x):
        torch.manual_seed(5)
        return face(x)

    out, loss, (_, _, indices) = again(z)
    want, error, best = drawn(face, z, noise, hard)
    assert torch.equal(indices, best)
    torch.testing.assert_close(out, want, rtol=0, atol=100 * K * EPS)
    torch.testing.assert_close(loss, error, rtol=0, atol=100 * K * EPS)
    found = gradients(face, z, lambda x: again(x)[:2])
    expected = gradients(face, z, lambda x: drawn(face, x, noise, hard)[:2])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e4 * K * EPS)
    with torch.no_grad():
        assert torch.equal(again(z)[2][2], indices)
    if hard:
        entry = face.get_codebook_entry(indices.flatten(), (2, 3, 5, D))
        torch.testing.assert_close(entry, out, rtol=0, atol=100 * K * EPS)


def test_an_evaluation_draws_nothing_and_a_training_forward_does():
    face = spread(GumbelQuantize(HIDDEN, D, K, use_vqinterface=False))
    z = latents(4, HIDDEN, 8, 8)
    first, second = face(z)[2], face(z)[2]
    assert not torch.equal(first, second)
    face.eval()
    assert torch.equal(face(z)[2], face(z)[2])
    assert torch.equal(face(z)[2], face.proj(z).argmax(1))
    # a temperature of the call is that of the gradient alone
    assert torch.equal(face(z, 0.1)[2], face(z, temp=3.0)[2])


def test_the_logits_come_on_request_and_a_checkpoint_draws_the_same():
    face = spread(GumbelQuantize(HIDDEN, D, K))
    z = latents(2, HIDDEN, 3, 5)
    *_, logits = face(z, return_logits=True)
    torch.testing.assert_close(logits, face.proj(z), rtol=0, atol=100 * EPS)
    found = []
    for again in (False, True):
        torch.manual_seed(1)
        x = z.clone().requires_grad_()
        out = checkpoint(lambda v: face(v)[0], x, use_reentrant=False) if again else face(x)[0]
        out.square().sum().backward()
        found.append(x.grad)
    torch.testing.assert_close(*found, rtol=0, atol=1000 * EPS)


def test_keywords_stand_in_the_order_and_with_the_defaults_of_taming():
    none = inspect.Parameter.empty
    remap = {"remap": None, "unknown_index": "random"}
    distance = {"n_e": none, "e_dim": none, "beta": none}
    for cls, want in (
        (VectorQuantizer, distance),
        (VectorQuantizer2, {**distance, **remap, "sane_index_shape": False, "legacy": True}),
        (
            GumbelQuantize,
            {
                "num_hiddens": none,
                "embedding_dim": none,
                "n_embed": none,
                "straight_through": True,
                "kl_weight": 5e-4,
                "temp_init": 1.0,
                "use_vqinterface": True,
                **remap,
            },
        ),
    ):
        found = {name: value.default for name, value in inspect.signature(cls).parameters.items()}
        assert list(found.items()) == list(want.items())
    for cls in (VectorQuantizer, VectorQuantizer2):
        state = cls(K, D, 0.25).state_dict()
        assert {key: tuple(value.shape) for key, value in state.items()} == {"embedding.weight": (K, D)}
        assert state["embedding.weight"].abs().max() <= 1 / K
    state = GumbelQuantize(HIDDEN, D, K, remap=USED).state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == {
        "used": (5,),
        "proj.weight": (K, HIDDEN, 1, 1),
        "proj.bias": (K,),
        "embed.weight": (K, D),
    }


class Live(nn.Module):
    """A stand-in with the attributes of a live quantizer of taming-transformers."""

    def __init__(self, **attributes):
        super().__init__()
        self.register_buffer("used", attributes.pop("used", None))
        if self.used is None:
            del self.used
        self.__dict__.update(attributes)


def test_live_quantizers_hand_over_their_tensors():
    first = Live(n_e=K, e_dim=D, beta=0.5)
    second = Live(
        n_e=K, e_dim=D, beta=0.5, legacy=False, sane_index_shape=True, remap="gone.npy", used=USED, re_embed=6
    )
    second.unknown_index = 5
    for live, cls in ((first, VectorQuantizer), (second, VectorQuantizer2)):
        live.embedding = nn.Embedding(K, D)
        before = torch.get_rng_state()
        face = cls.adopt(live.eval())
        assert torch.equal(torch.get_rng_state(), before)
        assert face.embedding.weight is live.embedding.weight
        assert (face.beta, face.training) == (0.5, False)
    assert face.used is USED
    assert (face.remap, face.re_embed, face.unknown_index, face.legacy) == ("gone.npy", 6, 5, False)
    _, indices = face.outcome(face(torch.randn(1, D, 4, 4)))
    assert indices.shape == (1, 4, 4)
    live = Live(embedding_dim=D, n_embed=K, straight_through=False, kl_weight=0.1, temperature=0.4)
    live.use_vqinterface, live.remap = False, None
    live.proj, live.embed = nn.Conv2d(HIDDEN, K, 1), nn.Embedding(K, D)
    face = GumbelQuantize.adopt(live)
    assert face.proj.weight is live.proj.weight
    assert face.embed.weight is live.embed.weight
    assert (face.temperature, face.kl_weight, face.straight_through) == (0.4, 0.1, False)
    z_q, indices = face.outcome(face(torch.randn(2, HIDDEN, 4, 4)))
    assert (z_q.shape, indices.shape) == ((2, D, 4, 4), (2, 4, 4))


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (lambda: VectorQuantizer2(K, D, 0.25)(torch.zeros(1, D, 2, 2), temp=2.0), "temp"),
        (
            lambda: VectorQuantizer2(K, D, 0.25)(torch.zeros(1, D, 2, 2), rescale_logits=True),
            "rescale_logits",
        ),
        (lambda: VectorQuantizer2(K, D, 0.25)(torch.zeros(1, D, 2, 2), return_logits=True), "return_logits"),
        (lambda: VectorQuantizer2(K, D, 0.25)(torch.zeros(1, 2, 2, D)), "B, 8, H, W"),
        (lambda: VectorQuantizer2(K, D, 0.25, remap=USED, unknown_index="last"), "unknown_index"),
        (lambda: VectorQuantizer2(K, D, 0.25, remap=USED).remap_to_used(USED), "2 dimensions"),
        (lambda: VectorQuantizer2(K, D, 0.25, remap=USED).get_codebook_entry(USED, None), "shape"),
        (lambda: GumbelQuantize(HIDDEN, D, K)(torch.zeros(1, D, 2, 2)), "B, 6, H, W"),
        (lambda: GumbelQuantize(HIDDEN, D, K)(torch.zeros(1, HIDDEN, 2, 2), 0.0), "temperature"),
        (lambda: VectorQuantizer(K, D, -1.0), "beta"),
    ],
)
def test_what_is_not_served_is_refused_by_name(run, words):
    with pytest.raises(ValueError, match=words):
        run()


def test_the_loss_of_even_logits_is_none_and_of_one_code_the_most():
    face = GumbelQuantize(HIDDEN, D, K, kl_weight=1.0).to(DEVICE).double()
    nn.init.zeros_(face.proj.weight)
    nn.init.zeros_(face.proj.bias)
    z = latents(1, HIDDEN, 2, 2)
    assert face(z)[1].abs() < 10 * EPS
    with torch.no_grad():
        face.proj.bias[3] = 1e3
    assert (face(z)[1] - math.log(K)).abs() < 10 * EPS
