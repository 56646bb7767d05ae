"""Bad input to quantizers: every message names the class, the argument, the value and a fix."""

import math

import pytest
import torch
from messages import check

from vqkernels.nn import (
    RPQ,
    STE,
    DiVeQ,
    EMACodebook,
    ImportanceReplacement,
    LatentMeans,
    Residual,
    SFDiVeQ,
    TwoPhase,
    VectorQuantizer,
    build,
)
from vqkernels.nn.codebooks import Codebook

X = torch.randn(6, 4)
INDEX = torch.zeros(6, dtype=torch.int64)
SHARED = LatentMeans(2)


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
        r"build: upkeep must be a list; got LatentMeans\. Pass such as",
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
    "nan noise_std": (
        lambda: DiVeQ(noise_std=math.nan),
        ValueError,
        r"DiVeQ: noise_std must be finite.*got nan",
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
        lambda: ImportanceReplacement(TwoPhase(5000), threshold=1.5),
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
        lambda: build("sf_diveq", dim=4, num_codes=8, upkeep=[ImportanceReplacement(TwoPhase(5000))]),
        ValueError,
        r"ImportanceReplacement: estimator must have one training index per code",
    ),
    "negative threshold": (
        lambda: ImportanceReplacement(TwoPhase(5000), threshold=-1),
        ValueError,
        r"threshold must be in \[0, 1\]; got -1",
    ),
    "a schedule without period": (
        lambda: TwoPhase(100, first=0),
        ValueError,
        r"TwoPhase: first must be at least 1; got 0",
    ),
    "a schedule that never comes": (
        lambda: TwoPhase(500),
        ValueError,
        r"TwoPhase: total_steps must be more than stop_before, 1000, .*got 500\. Call TwoPhase\.scaled\(500\)",
    ),
    "a tensor for a codebook": (
        lambda: VectorQuantizer(X, DiVeQ()),
        TypeError,
        r"VectorQuantizer: codebook must be a Codebook; got Tensor",
    ),
    "an estimator's class": (
        lambda: VectorQuantizer(Codebook(4, 4), DiVeQ),
        TypeError,
        r"VectorQuantizer: estimator must be an Estimator; got the class DiVeQ",
    ),
    "one upkeep alone": (
        lambda: VectorQuantizer(Codebook(4, 4), DiVeQ(), LatentMeans(1)),
        TypeError,
        r"VectorQuantizer: upkeep must be a list; got LatentMeans",
    ),
    "one upkeep alone, by name": (
        lambda: build("product", dim=4, num_codes=4, upkeep=LatentMeans(1)),
        TypeError,
        r"build: upkeep must be a list; got LatentMeans",
    ),
    "a schedule as upkeep": (
        lambda: VectorQuantizer(Codebook(4, 4), DiVeQ(), [TwoPhase(5000)]),
        TypeError,
        r"VectorQuantizer: upkeep must be an Upkeep; got TwoPhase",
    ),
    "follow nothing": (
        lambda: build("ste", dim=4, num_codes=4).follow(None),
        TypeError,
        r"VectorQuantizer: optimizer must be an Optimizer; got NoneType",
    ),
    "a stage alone": (
        lambda: Residual(build("ste", dim=4, num_codes=4)),
        TypeError,
        r"Residual: stages must be a list of quantizers; got VectorQuantizer",
    ),
    "no warm-up steps": (lambda: LatentMeans(0), ValueError, r"LatentMeans: steps must be at least 1; got 0"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_message(case):
    check(case)


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
