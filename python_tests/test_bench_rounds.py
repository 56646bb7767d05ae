"""Who is measured how often on a CPU, what others are compared with, and who is installed to be measured."""

import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import options  # noqa: E402
import run  # noqa: E402
import summary  # noqa: E402

from vqkernels.profiling import peers  # noqa: E402
from vqkernels.profiling.searches import searches  # noqa: E402

CPU = torch.device("cpu")


def test_rounds_follow_the_time_of_a_call():
    peer = peers.Contender("peer", None)
    bench = run.Bench(options.parse(["--each", "3"]))
    rounds = {t: bench.rounds(run.Checked(peer, None, t)) for t in (0.001, 0.25, 1.9, 2.1, 30.0)}
    # the last is measured by the call that was checked
    assert rounds == {0.001: run.MOST, 0.25: 12, 1.9: run.FEWEST, 2.1: 1, 30.0: 0}
    for name in (*summary.SEARCHES, *summary.LAYERS, "vqkernels diveq"):
        judged = {
            t: bench.rounds(run.Checked(peers.Contender(name, None), None, t))
            for t in (2.1, 11.0, 39.0, 41.0)
        }
        assert judged == {2.1: run.FEWEST, 11.0: 2, 39.0: 2, 41.0: 0}
    bench = run.Bench(options.parse(["--rounds", "7"]))
    assert [bench.rounds(run.Checked(peer, None, t)) for t in (0.1, 30.0)] == [7, 2]


def test_the_base_is_ours_whole_and_of_its_kind():
    ours = peers.Contender("vqkernels native", None, exact=True)
    assert run.is_base(ours, "search") and not run.is_base(replace(ours, prepared=True), "search")
    assert not run.is_base(replace(ours, isa="avx2"), "search") and not run.is_base(
        replace(ours, exact=False), "search"
    )
    prepared = [each for each in searches(CPU, torch.float32) if each.name.endswith("prepared")]
    assert all(each.prepared and not run.is_base(each, "search") for each in prepared)
    bases = {"vqkernels diveq": 2.0, "vqkernels sf_diveq": 5.0}
    medians = {**bases, "diveq DIVEQ": 1.0}
    for name in ("diveq DIVEQ", "vector-quantize-pytorch (EMA)", "vqkernels avx2 diveq"):
        assert run.base_of(name, "layer", bases, medians) == 2
    for name in ("diveq SFDIVEQ", "vqkernels avx2 sf_diveq"):
        assert run.base_of(name, "layer", bases, medians) == 5
    assert run.base_of("diveq DIVEQ", "layer", {}, medians) == 1


def test_what_is_too_large_for_a_default_run_must_be_asked_for():
    large = peers.Contender("peer", None, most_pairs=100)
    bench, asked = (run.Bench(options.parse(words)) for words in ([], ["--names", "peer"]))
    assert "takes too long" not in str(bench.why_not(large, (10, 10, 1), 60.0))
    assert "--names asks for it" in str(bench.why_not(large, (11, 10, 1), 60.0))
    assert asked.why_not(large, (11, 10, 1), 60.0) is None


def test_make_installs_the_peers_that_the_bench_knows():
    line = next(text for text in (ROOT / "Makefile").read_text().splitlines() if text.startswith("PEERS :="))
    names = set(line.removeprefix("PEERS :=").split())
    assert names == set(peers.PEERS_ON_CPU.values())
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert names | {"pytest-benchmark", "matplotlib", "tyro"} == set(extras["bench"])
