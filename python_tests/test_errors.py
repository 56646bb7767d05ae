"""Bad input: every message names the op, the argument, the value and a fix."""

import copy
import math
import re

import pytest
import torch

import vqkernels as vq
from vqkernels import BackendError
from vqkernels.nn import (
    RPQ,
    STE,
    DiVeQ,
    EMACodebook,
    ImportanceReplacement,
    LatentMeans,
    SFDiVeQ,
    TwoPhase,
    VectorQuantizer,
    build,
)
from vqkernels.nn.codebooks import Codebook
from vqkernels.ops import OPS

X, C = torch.randn(6, 4), torch.randn(5, 4)
SHARED = LatentMeans(2)
INDEX = torch.zeros(6, dtype=torch.int64)
SEED32 = torch.tensor(1, dtype=torch.int32)


def reference_alone(name):
    op = copy.copy(OPS[name])
    op.backends = {"reference": op.backends["reference"]}
    return op


CASES = {
    "no codebook": (
        lambda: VectorQuantizer(None, STE()),
        TypeError,
        r"codebook must be a Codebook; got NoneType\. Pass such as Codebook",
    ),
    "a class in place of an estimator": (
        lambda: VectorQuantizer(Codebook(5, 4), STE),
        TypeError,
        r"estimator must be an Estimator; got the class STE\. Pass such as STE",
    ),
    "upkeep without a list": (
        lambda: build("ste", dim=4, num_codes=5, upkeep=LatentMeans(2)),
        TypeError,
        r"build: upkeep must be a sequence; got LatentMeans\. Pass a list",
    ),
    "a word in place of upkeep": (
        lambda: VectorQuantizer(Codebook(5, 4), STE(), ["importance"]),
        TypeError,
        r"upkeep must be an Upkeep; got str",
    ),
    "a wrapper in place of an optimizer": (
        lambda: build("ste", dim=4, num_codes=5).follow(torch.nn.Linear(2, 2)),
        TypeError,
        r"VectorQuantizer: optimizer must be an Optimizer; got Linear",
    ),
    "channel_dim of RPQ": (
        lambda: RPQ(4, 5, channel_dim=1.0),
        TypeError,
        r"RPQ: channel_dim must be an int; got 1\.0",
    ),
    "decode a list": (
        lambda: build("ste", dim=4, num_codes=5).decode([[0]]),
        TypeError,
        r"decode: indices must be a tensor; got list",
    ),
    "decode what is no code": (
        lambda: build("ste", dim=4, num_codes=5).decode(torch.tensor([[5]])),
        ValueError,
        r"decode: indices must be below 5; got 5",
    ),
    "decode what is no point of a large grid": (
        lambda: build("lfq", dim=4, num_codes=2**20).decode(torch.tensor([[2**20]])),
        ValueError,
        r"decode: indices must be below 1048576; got 1048576",
    ),
    "decode a code of another group": (
        lambda: build("product", dim=4, num_codes=5).decode(torch.tensor([[5, 0]])),
        ValueError,
        r"decode: indices must be below 5; got 5",
    ),
    "decode a level that is none": (
        lambda: VectorQuantizer(Codebook(5, 4), SFDiVeQ(evaluation="segment", bits=2)).decode(
            torch.tensor([[0, 4]])
        ),
        ValueError,
        r"decode: indices\[\.\.\., 1\] must be below 4; got 4",
    ),
    "wrong rank of the codebook": (
        lambda: vq.nearest_code(X, C[0]),
        ValueError,
        r"codebook must be \(K, D\) or \(G, K, D\); got shape \(4,\)",
    ),
    "scalar x": (
        lambda: vq.nearest_code(X[0, 0], C),
        ValueError,
        r"x must be \(\.\.\., D\); got a 0-d tensor",
    ),
    "D mismatch": (
        lambda: vq.nearest_code(X, torch.randn(5, 3)),
        ValueError,
        r"codebook must be \(K, 4\) .* got \(5, 3\)",
    ),
    "transposed codebook": (
        lambda: vq.diveq(X, torch.randn(4, 9)),
        ValueError,
        r"got \(4, 9\)\. Pass codebook\.t\(\)",
    ),
    "integer x": (
        lambda: vq.nearest_code(X.long(), C),
        TypeError,
        r"x must be float16.*got torch\.int64\. Call x\.float\(\)",
    ),
    "integer codebook": (
        lambda: vq.sf_diveq(X, C.int()),
        TypeError,
        r"codebook must be float16.*got torch\.int32",
    ),
    "not a tensor": (lambda: vq.nearest_code([[1.0]], C), TypeError, r"x must be a tensor; got list"),
    "another device": (
        lambda: vq.nearest_code(X, C.to("meta")),
        ValueError,
        r"codebook must be on cpu as x is; got meta\. Call",
    ),
    "K = 0": (lambda: vq.nearest_code(X, C[:0]), ValueError, r"codebook must have at least 1 code; got 0"),
    "D = 0": (lambda: vq.nearest_code(X[:, :0], C[:, :0]), ValueError, r"at least one feature; got 0"),
    "K = 1 for SF-DiVeQ": (
        lambda: vq.sf_diveq(X, C[:1]),
        ValueError,
        r"sf_diveq: codebook must have at least 2 codes; got 1",
    ),
    "K = 1 for segments": (lambda: vq.nearest_segment(X, C[:1]), ValueError, r"at least 2 codes; got 1"),
    "negative noise_std": (
        lambda: vq.diveq(X, C, noise_std=-1.0),
        ValueError,
        r"noise_std must be finite and not negative; got -1\.0",
    ),
    "infinite noise_std": (
        lambda: vq.sf_diveq(X, C, noise_std=math.inf),
        ValueError,
        r"noise_std must be finite.*got inf",
    ),
    "nan noise_std": (
        lambda: DiVeQ(noise_std=math.nan),
        ValueError,
        r"DiVeQ: noise_std must be finite.*got nan",
    ),
    "noise_std of another type": (
        lambda: vq.diveq(X, C, noise_std="1"),
        TypeError,
        r"noise_std must be a number; got str",
    ),
    "seed of another dtype": (
        lambda: vq.diveq(X, C, seed=SEED32),
        TypeError,
        r"seed must be an int or an int64 tensor; got torch\.int32",
    ),
    "seed of floats": (
        lambda: vq.diveq(X, C, seed=1.5),
        TypeError,
        r"seed must be an int or an int64 tensor; got float",
    ),
    "a seed per row": (
        lambda: vq.diveq(X, C, seed=INDEX),
        ValueError,
        r"seed must be a 0-d tensor; got shape \(6,\)",
    ),
    "a seed of 65 bits": (
        lambda: vq.diveq(X, C, seed=2**64),
        ValueError,
        r"seed must fit in 64 bits; got 18446744073709551616",
    ),
    "negative row_offset": (
        lambda: vq.diveq(X, C, row_offset=-1),
        ValueError,
        r"row_offset must be at least 0; got -1",
    ),
    "unknown backend": (
        lambda: vq.nearest_code(X, C, backend="cutlass"),
        BackendError,
        r"backend must be one of 'native', 'triton', 'reference'; got 'cutlass'",
    ),
    "unknown backend for a block": (
        lambda: vq.use_backend("cuda").__enter__(),
        BackendError,
        r"use_backend: backend must be one of .* got 'cuda'",
    ),
    "a backend that cannot run": (
        lambda: vq.nearest_code(X.double(), C, backend="triton"),
        BackendError,
        r"backend 'triton' cannot run these inputs: it needs float16, bfloat16 or float32|triton is not installed",
    ),
    "a backend without a body": (
        lambda: reference_alone("nearest_segment").select(X, C, backend="native"),
        BackendError,
        r"nearest_segment: backend 'native' cannot run these inputs: it has no body",
    ),
    "indices of another dtype": (
        lambda: vq.directional(X, C, INDEX.int()),
        TypeError,
        r"indices must be an int64 tensor; got torch\.int32\. Call indices\.long\(\)",
    ),
    "indices of another shape": (
        lambda: vq.directional(X, C, INDEX[:3]),
        ValueError,
        r"indices must be \(6,\) to match x; got \(3,\)",
    ),
    "position of another shape": (
        lambda: vq.directional(X, C, INDEX, position=X),
        ValueError,
        r"position must be \(6,\) to match x; got \(6, 4\)",
    ),
    "unknown direction": (
        lambda: vq.directional(X, C, INDEX, direction="up"),
        ValueError,
        r"direction must be one of 'noisy', 'detach', 'random'; got 'up'",
    ),
    "huge row_offset": (lambda: vq.diveq(X, C, row_offset=2**63), ValueError, r"row_offset must be at most"),
    "huge num_codes": (
        lambda: vq.code_sums(X, INDEX, 2**62),
        ValueError,
        r"num_codes must be at most 2147483648",
    ),
    "rows without features": (
        lambda: vq.code_sums(X[:, :0], INDEX, 3),
        ValueError,
        r"code_sums: x must have at least one",
    ),
    "a single number": (
        lambda: vq.code_sums(X[0, 0], INDEX[0], 3),
        ValueError,
        r"x must be \(\.\.\., D\); got a 0-d tensor",
    ),
    "exact of another type": (
        lambda: vq.nearest_code(X, C, exact="no"),
        TypeError,
        r"exact must be True or False; got 'no'",
    ),
    "a backend without a name": (
        lambda: vq.nearest_code(X, C, backend=""),
        BackendError,
        r"backend must be one of .*; got ''",
    ),
    "codes of integers": (
        lambda: Codebook(4, 4, dtype=torch.int64),
        TypeError,
        r"dtype must be a floating-point dtype; got torch\.int64",
    ),
    "channel_dim of another type": (
        lambda: VectorQuantizer(Codebook(4, 4), DiVeQ(), channel_dim="a"),
        TypeError,
        r"channel_dim must be an int; got 'a'",
    ),
    "a weight of another type": (
        lambda: STE(codebook_weight=None),
        TypeError,
        r"codebook_weight must be a number.*got NoneType",
    ),
    "a threshold above 1": (
        lambda: ImportanceReplacement(TwoPhase(10), threshold=1.5),
        ValueError,
        r"threshold must be in \[0, 1\]; got 1\.5",
    ),
    "more bits than a position has": (
        lambda: SFDiVeQ(bits=25),
        ValueError,
        r"bits must be at most 24; got 25",
    ),
    "evaluation set to nonsense": (
        lambda: setattr(SFDiVeQ(), "evaluation", "codewrd"),
        ValueError,
        r"evaluation must be one of .*; got 'codewrd'",
    ),
    "indices of floats to decode": (
        lambda: build("ste", dim=4, num_codes=8).decode(X),
        TypeError,
        r"decode: indices must be int64; got torch\.float32",
    ),
    "indices of another Q": (
        lambda: build("ste", dim=4, num_codes=8).decode(INDEX[:, None].expand(6, 2)),
        ValueError,
        r"indices must be \(\.\.\., 1\); got \(6, 2\)",
    ),
    "upkeep of two quantizers": (
        lambda: [build("diveq", dim=4, num_codes=8, upkeep=[SHARED]) for _ in range(2)],
        ValueError,
        r"upkeep must belong to one quantizer; got one in use",
    ),
    "num_codes 0": (
        lambda: vq.code_sums(X, INDEX, 0),
        ValueError,
        r"code_sums: num_codes must be at least 1; got 0",
    ),
    "num_codes of another type": (
        lambda: vq.code_sums(X, INDEX, 2.0),
        TypeError,
        r"num_codes must be an int; got float",
    ),
    "too few codes for a quantizer": (
        lambda: build("sf_diveq", dim=4, num_codes=1),
        ValueError,
        r"at least 2 codes for SFDiVeQ; got 1",
    ),
    "unknown quantizer": (
        lambda: build("vq", dim=4, num_codes=8),
        ValueError,
        r"build: name must be one of '.* got 'vq'",
    ),
    "noise for a method without": (
        lambda: build("ste", dim=4, num_codes=8, noise_std=0.1),
        ValueError,
        r"noise_std must be None for 'ste'.*got 0\.1",
    ),
    "features elsewhere": (
        lambda: build("ste", dim=4, num_codes=8)(torch.randn(2, 4, 5, 6)),
        ValueError,
        r"x must have 4 features in dimension -1; got shape \(2, 4, 5, 6\)",
    ),
    "integer latents": (
        lambda: build("ste", dim=4, num_codes=8)(INDEX),
        TypeError,
        r"VectorQuantizer: x must be float16.*got torch\.int64",
    ),
    "no codes": (
        lambda: build("ste", dim=4, num_codes=0),
        ValueError,
        r"build: num_codes must be at least 1; got 0",
    ),
    "decay of 1": (lambda: EMACodebook(4, 4, decay=1.0), ValueError, r"decay must be in \[0, 1\); got 1\.0"),
    "unknown init": (
        lambda: Codebook(4, 4, init="zeros"),
        ValueError,
        r"init must be one of 'uniform', 'normal'; got 'zeros'",
    ),
    "unknown evaluation": (
        lambda: SFDiVeQ(evaluation="line"),
        ValueError,
        r"evaluation must be one of 'codeword', 'curve', 'segment'; got 'line'",
    ),
    "replacement of segments": (
        lambda: build("sf_diveq", dim=4, num_codes=8, upkeep=[ImportanceReplacement(TwoPhase(10))]),
        ValueError,
        r"ImportanceReplacement: estimator must have one training index per code",
    ),
    "negative threshold": (
        lambda: ImportanceReplacement(TwoPhase(10), threshold=-1),
        ValueError,
        r"threshold must be in \[0, 1\]; got -1",
    ),
    "a schedule without period": (
        lambda: TwoPhase(100, first=0),
        ValueError,
        r"TwoPhase: first must be at least 1; got 0",
    ),
    "no warm-up steps": (lambda: LatentMeans(0), ValueError, r"LatentMeans: steps must be at least 1; got 0"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_message(case):
    run, error, words = case
    with pytest.raises(error, match=words) as caught:
        run()
    text = str(caught.value)
    # what, what was got, and what to do about it: three clauses, one line
    assert re.fullmatch(r"[\w-]+: [^\n]+[.;] [A-Z][^\n]+\.", text), text
    assert "must" in text or "cannot" in text


def test_evaluation_before_the_codes_started():
    quantizer = build("sf_diveq", dim=4, num_codes=4, upkeep=[LatentMeans(2)]).eval()
    with pytest.raises(RuntimeError, match="must be initialized to evaluate; got a warm-up under way"):
        quantizer(X)


def test_warm_up_with_too_few_latents():
    quantizer = build("sf_diveq", dim=4, num_codes=64, upkeep=[LatentMeans(1)])
    quantizer(X)
    before = quantizer.export()
    with pytest.raises(RuntimeError, match="see at least 64 finite latents; got 6"):
        quantizer.commit()
    assert torch.equal(before, quantizer.export())


def test_the_curve_does_not_decode():
    quantizer = VectorQuantizer(Codebook(4, 4), SFDiVeQ(evaluation="curve")).eval()
    with pytest.raises(ValueError, match="must be 'codeword' or 'segment' to decode; got 'curve'"):
        quantizer.decode(quantizer(X).indices)
