"""`VectorQuantize` on two ranks, made before there is a process group, beside one that sees both batches."""

import torch
from processes import two_processes

from vqkernels.compat.vector_quantize_pytorch import VectorQuantize

N, D, K = 40, 8, 16
CASES = {
    "ema": {},
    "affine": {"affine_param": True, "sync_affine_param": True},
    "in place": {
        "learnable_codebook": True,
        "ema_update": False,
        "in_place_codebook_optimizer": lambda p: torch.optim.SGD(p, lr=4.0),
    },
    "dead codes": {"threshold_ema_dead_code": 100},
    "kmeans": {"kmeans_init": True, "kmeans_iters": 3},
    "apart": {"sync_codebook": False},
}


def after_two_steps(name, x, seed):
    torch.manual_seed(0)
    quantizer = VectorQuantize(D, K, **CASES[name])
    torch.manual_seed(seed)
    for _ in range(2):
        quantizer(x)
    return {key: value.detach().clone() for key, value in quantizer.state_dict().items()}


def rank_states(rank, batches):
    return {name: after_two_steps(name, batches[rank : rank + 1], rank + 1) for name in CASES}


def test_two_ranks_are_one():
    batches = torch.randn(2, N, D, generator=torch.Generator().manual_seed(0))
    first, second = two_processes(rank_states, batches)
    whole = {name: after_two_steps(name, batches, 1) for name in ("ema", "affine", "in place")}
    for name in CASES:
        alike = all(torch.equal(first[name][key], second[name][key]) for key in first[name])
        assert alike == (name != "apart"), name
    eps = torch.finfo(torch.float32).eps
    for name, state in whole.items():
        for key, value in state.items():
            got, wanted = first[name][key].double(), value.double()
            assert (got - wanted).abs().max() <= 16 * N * eps * (1 + wanted.abs().max()), (name, key)
    # rows of both ranks take the place of dead codes, each once
    same = first["dead codes"]["_codebook.embed"][0][:, None] == batches.flatten(0, 1)
    owners = same.all(-1).nonzero()[:, 1]
    assert len(owners) == K == len(owners.unique())
    assert ((owners < N).sum(), (owners >= N).sum()) == (K // 2, K // 2)
