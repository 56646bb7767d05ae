"""A codebook spread over processes: indices, values, gradients and training equal one process with all of it."""

import pytest
import torch
from processes import two_processes
from torch.nn.parallel import DistributedDataParallel

from vqkernels.nn import NSVQ, STE, Codebook, DiVeQ, EMACodebook, SFDiVeQ, VectorQuantizer
from vqkernels.nn.quantizers.sharded import ShardedVectorQuantizer, ignore_shards

D, K, ROWS, STEPS = 5, 24, 40, 3
ESTIMATORS = {"ste": STE, "diveq": DiVeQ, "nsvq": NSVQ}


class Model(torch.nn.Module):
    """A linear encoder and decoder around a quantizer."""

    def __init__(self, quantizer):
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.decoder = torch.nn.Linear(7, D), torch.nn.Linear(D, 7)
        self.quantizer = quantizer

    def forward(self, x, mask=None):
        z, indices, loss = self.quantizer(self.encoder(x), mask)
        return self.decoder(z), indices, loss


def codes():
    """Normal codes; some of the second half equal some of the first, so that ties cross the shards."""
    made = torch.randn(K, D, generator=torch.Generator().manual_seed(3))
    made[K // 2 : K // 2 + 3] = made[:3]
    return made


def batches():
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(ROWS, 7, generator=generator) for _ in range(STEPS)]


def train(model, bare, part):
    """Losses, indices and parameters after a few steps on a part of each batch; one row is masked, one is not finite."""
    optimizer = torch.optim.SGD(model.parameters(), 0.3)
    torch.manual_seed(11)
    seen = []
    for x in batches():
        x, mask = x.clone(), torch.ones(ROWS, dtype=torch.bool)
        mask[5] = False
        out, indices, loss = model(x[part], mask[part])
        total = (out - x[part])[mask[part]].square().sum() / ROWS * (ROWS / len(x[part])) + loss
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        seen.append((indices, total.detach()))
    bare.eval()
    latents = bare.encoder(batches()[0][part]).detach()
    latents[1, 2] = torch.inf
    evaluated = bare.quantizer(latents)
    parameters = {name: value.detach() for name, value in bare.named_parameters() if "codebook" not in name}
    return {
        "indices": [indices for indices, _ in seen],
        "losses": [loss for _, loss in seen],
        "parameters": parameters,
        "codes": bare.quantizer.export(),
        "z": evaluated.z.detach(),
        "evaluated": evaluated.indices,
        "decoded": bare.quantizer.decode(evaluated.indices).detach(),
    }


def on_rank(rank):
    half, part = slice(rank * K // 2, (rank + 1) * K // 2), slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)
    found = {}
    for name, estimator in ESTIMATORS.items():
        quantizer = ShardedVectorQuantizer(Codebook(K // 2, D), estimator())
        quantizer.codebook.assign(codes()[half])
        bare = Model(quantizer)
        assert ignore_shards(bare) == ["quantizer.codebook.weight"]
        found[name] = train(DistributedDataParallel(bare), bare, part)
    return found


def test_two_shards_equal_one_codebook():
    found = two_processes(on_rank)
    for name, estimator in ESTIMATORS.items():
        whole = Model(VectorQuantizer(Codebook(K, D), estimator()))
        whole.quantizer.codebook.assign(codes())
        expected = train(whole, whole, slice(None))
        first, second = found[0][name], found[1][name]
        for step in range(STEPS):
            joint = torch.cat([one["indices"][step] for one in (first, second)])
            assert torch.equal(joint, expected["indices"][step]), name
            assert (joint[5] == -1).all()
            mean = (first["losses"][step] + second["losses"][step]) / 2
            torch.testing.assert_close(mean, expected["losses"][step])
        for one in (first, second):
            torch.testing.assert_close(one["codes"], expected["codes"])
            for key, value in expected["parameters"].items():
                torch.testing.assert_close(one["parameters"][key], value)
            assert (one["decoded"][2:] == one["z"][2:]).all()
            assert one["z"][1].isnan().all()


def test_a_single_process_is_a_vector_quantizer():
    sharded = ShardedVectorQuantizer(Codebook(K, D), DiVeQ())
    plain = VectorQuantizer(Codebook(K, D), DiVeQ())
    for quantizer in (sharded, plain):
        quantizer.codebook.assign(codes())
    x = torch.randn(30, D)
    results = []
    for quantizer in (sharded, plain):
        torch.manual_seed(1)
        rows = x.clone().requires_grad_()
        z, indices, _ = quantizer(rows)
        z.square().sum().backward()
        results.append((z, indices, rows.grad, quantizer.codebook.weight.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    assert torch.equal(sharded.eval()(x).z, plain.eval()(x).z)
    assert torch.equal(sharded.export(), plain.export()) and sharded.bits_per_latent == plain.bits_per_latent


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: ShardedVectorQuantizer(EMACodebook(4, 2), STE()),
            TypeError,
            "codebook must be a plain learned one",
        ),
        (
            lambda: ShardedVectorQuantizer(Codebook(4, 2), SFDiVeQ()),
            ValueError,
            "estimator must search single codes",
        ),
    ],
)
def test_what_cannot_be_sharded(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_no_rows():
    """An empty batch has no code to cross to, and no gradient."""
    quantizer = ShardedVectorQuantizer(Codebook(4, 3), STE())
    z, indices, loss = quantizer(torch.zeros(0, 3, requires_grad=True))
    (z.sum() + loss).backward()
    assert z.shape == (0, 3) and indices.shape == (0, 1) and not quantizer.codebook.weight.grad.any()
