"""A face and its live peer side by side: same weights, same input, and how far apart they may be."""

import torch

EPS = torch.finfo(torch.float32).eps


def pair(face_of, peer_of, *options, **named):
    """A face and a peer of one seed and equal state, and a face that adopted a second such peer."""
    modules = []
    for kind in (face_of, peer_of, peer_of):
        torch.manual_seed(1)
        modules.append(kind(*options, **named))
    face, peer, live = modules
    ours, theirs = face.state_dict(), peer.state_dict()
    assert {k: (v.shape, v.dtype) for k, v in ours.items()} == {
        k: (v.shape, v.dtype) for k, v in theirs.items()
    }
    face.load_state_dict(theirs)
    peer.load_state_dict(ours)
    before = dict(live.named_parameters()) | dict(live.named_buffers())
    state = torch.get_rng_state()
    adopted = face_of.adopt(live)
    assert torch.equal(torch.get_rng_state(), state)
    after = dict(adopted.named_parameters()) | dict(adopted.named_buffers())
    assert before.keys() == after.keys() and all(after[k] is v for k, v in before.items())
    return face, peer, adopted


def leaves(result):
    """The tensors of nested tuples, in order."""
    if isinstance(result, torch.Tensor):
        return [result]
    return [] if result is None else [leaf for part in result for leaf in leaves(part)]


def run(module, x, seed=3, **options):
    """What forward returns for x, and gradients of x and the parameters of a fixed function of it all."""
    x = x.detach().clone().requires_grad_()
    torch.manual_seed(seed)
    result = module(x, **options)
    total = torch.zeros(())
    for part in leaves(result):
        if part.requires_grad:
            # weights that no symmetry cancels
            total = total + (part * torch.linspace(1, 2, part.numel()).view(part.shape).to(part.dtype)).sum()
    inputs = [x, *(p for p in module.parameters() if p.requires_grad)]
    grads = (
        torch.autograd.grad(total, inputs, allow_unused=True) if total.requires_grad else [None] * len(inputs)
    )
    return result, list(grads)


def assert_near(got, want, terms):
    """Equal up to so many roundings of the largest number; integers and None exactly."""
    if got is None or want is None:
        # one writes zeros where the other leaves None
        some = want if got is None else got
        assert some is None or not some.any()
        return
    assert got.shape == want.shape and got.dtype == want.dtype
    if not want.is_floating_point():
        assert torch.equal(got, want)
    elif want.numel():
        torch.testing.assert_close(got, want, rtol=0, atol=terms * EPS * float(want.detach().abs().max()))


def assert_same(got, want, terms):
    """Two answers of `run` agree."""
    ours, theirs = leaves(got[0]) + got[1], leaves(want[0]) + want[1]
    for a, b in zip(ours, theirs, strict=True):
        assert_near(a, b, terms)


def assert_not_farther(face, x, ours, theirs):
    """Indices are equal but where the peer's is not nearer in float64; returns how many differ."""
    different = ours != theirs
    gap = (face.sq_dist_of(x, ours) - face.sq_dist_of(x, theirs))[different]
    assert (gap <= 0).all()
    return int(different.sum())
