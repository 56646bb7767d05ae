"""Bad input to ops: every message names the op, the argument, the value and a fix."""

import copy
import math

import pytest
import torch
from messages import check

import vqkernels as vq
from vqkernels import BackendError
from vqkernels.ops import OPS

X, C = torch.randn(6, 4), torch.randn(5, 4)
INDEX = torch.zeros(6, dtype=torch.int64)
SEED32 = torch.tensor(1, dtype=torch.int32)


def reference_alone(name):
    op = copy.copy(OPS[name])
    op.backends = {"reference": op.backends["reference"]}
    return op


CASES = {
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
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_message(case):
    check(case)
