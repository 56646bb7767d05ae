"""What the benches have for CPUs: peaks, memory, instruction sets, tables, figures, curves and microbenchmarks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vqkernels import native
from vqkernels.testing import brute_force

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import curves  # noqa: E402
import figures  # noqa: E402
import options  # noqa: E402
import readme  # noqa: E402
import records  # noqa: E402
import run  # noqa: E402
import summary  # noqa: E402

from vqkernels.profiling import memory, oracle, peers, timing  # noqa: E402
from vqkernels.profiling.layers import layers  # noqa: E402
from vqkernels.profiling.searches import searches  # noqa: E402
from vqkernels.profiling.timing import Failure, Floors, HostClock, spread_out  # noqa: E402

CPU = torch.device("cpu")
ISAS = native.facts().get("isas_supported", [])
needs_native = pytest.mark.skipif(native.MISSING is not None, reason=f"native: {native.MISSING}")


@pytest.fixture(autouse=True)
def _quick_floors(monkeypatch):
    monkeypatch.setattr(timing, "_HOST_SECONDS", 0.001)
    monkeypatch.setattr(timing, "_HOST_COPIED", 1 << 20)
    monkeypatch.setattr(timing, "_SETTLED", 0.0)


@needs_native
def test_peaks_are_those_of_the_instruction_set():
    """A compiler that saw through the loops would report rates that no wider vector could beat."""
    before = native.facts()["isa"]
    rates = {}
    try:
        for isa in ISAS:
            native.set_isa(isa)
            rates[isa] = native.peaks(0.05)
    finally:
        native.set_isa(before)
    for found in rates.values():
        assert set(found) <= {"float32", "int16", "bfloat16"} and all(rate > 1e8 for rate in found.values())
    for narrow, wide in (("portable", "avx2"), ("avx2", "avx512")):
        for kind in ("float32", "int16"):
            if narrow in rates and wide in rates:
                # twice the width, or where that unit is not doubled the same rate; halved for noise
                assert rates[wide][kind] > 0.5 * rates[narrow][kind]
    if "int16" in rates["portable"]:
        # eight products in an instruction and a sum in another, against four and one, or none if they were hoisted
        assert rates["portable"]["int16"] < 6 * rates["portable"]["float32"]
    assert HostClock().floors(torch.float32).flops == pytest.approx(max(native.peaks(0.05).values()), rel=0.9)


def test_floors_only_rise():
    first = Floors(2.0, 5.0, kinds={"float32": 1.0, "int16": 2.0})
    best = first.best(Floors(3.0, 4.0, kinds={"float32": 0.5, "int16": 3.0}))
    assert (best.flops, best.bandwidth, dict(best.kinds)) == (3.0, 5.0, {"float32": 1.0, "int16": 3.0})
    assert Floors().best(Floors()) == Floors()


def test_few_calls_are_spread_among_many():
    order = []
    runs = {name: (lambda name=name: order.append(name)) for name in "ab"}
    times, failed = spread_out(HostClock(), runs, {"a": 6, "b": 2})
    assert "".join(order) == "aaabaaab" and [len(times[name]) for name in "ab"] == [6, 2] and failed == {}
    times, failed = spread_out(HostClock(), {"c": lambda: 1 / 0, **runs}, {"a": 1, "b": 1, "c": 3})
    assert list(times) == ["a", "b"] and failed == {"c": "ZeroDivisionError: division by zero"}


def test_a_call_that_takes_long_is_measured_while_it_is_checked(tmp_path, monkeypatch):
    calls = []

    def slow(codes, inputs):
        return lambda x: calls.append(len(x)) or brute_force(x, codes)[0]

    monkeypatch.setattr(run, "searches", lambda device, dtype, isas: [peers.Contender("peer", slow)])
    monkeypatch.setattr(run, "LONG", 0.0)
    words = ["--shapes", "320,40,8", "--cases", "search", "--no-memory", "--out", str(tmp_path / "out.jsonl")]
    bench = run.Bench(options.parse(words))
    assert bench.go() == 0 and calls == [10, 10, 320]
    assert bench.measured[0]["rounds"] == 1 and bench.measured[0]["ms_p50"] > 0


def test_the_cases_of_a_cpu():
    cases = options.cases(options.parse([]))
    assert cases == [("search", s) for s in options.SEARCHED_ON_CPU] + [
        ("layer", s) for s in options.LAYERS_ON_CPU
    ]
    given = options.parse(["--shapes", "3,4,5", "--cases", "layer"])
    assert options.cases(given) == [("layer", (3, 4, 5))]
    told = options.parse(["--isas", "portable", "sse9"])
    assert told.unsupported == (["sse9"] if ISAS else ["portable", "sse9"])


@needs_native
def test_a_forced_instruction_set_is_in_force_for_its_calls_alone(tmp_path, capsys):
    words = ["--shapes", "300,40,8", "--rounds", "3", "--isas", "portable", "--only", "native", "portable"]
    bench = run.Bench(options.parse([*words, "--no-memory", "--out", str(tmp_path / "out.jsonl")]))
    assert bench.go() == 0
    names = [record["name"] for record in bench.measured]
    expected = ["vqkernels native", "vqkernels native prepared", "vqkernels native portable"]
    assert names == [*expected, "vqkernels portable diveq", "vqkernels portable sf_diveq"]
    assert bench.measured[2]["isa_floor_tflops"] > 0 and "isa_floor_tflops" not in bench.measured[0]
    seen = []
    call = peers.forced(lambda x: seen.append(native.facts()["isa"]), "portable")
    call(None)
    assert seen == ["portable"] and native.facts()["isa"] == ISAS[0]


def test_every_peer_finds_the_nearest_code():
    """Those that are installed; bfloat16 nearly."""
    x, codes = torch.randn(200, 8), torch.randn(33, 8)
    expected = brute_force(x, codes)[0]
    for each in searches(CPU, torch.float32):
        if each.name == "pykeops":
            # it compiles for seconds, in a folder of its own
            continue
        found = peers.bind(each, codes, [x], x)(x)
        share = float((found.long() == expected).double().mean())
        assert share >= (0.9 if "bfloat16" in each.name else 1.0), each.name
    for each in layers(CPU, torch.float32):
        z, *grads = peers.bind(each, codes, [x], torch.ones_like(x))(x)
        assert z.shape == x.shape and grads[0].shape == x.shape and torch.isfinite(z).all(), each.name


def test_near_misses_are_plausible_and_others_are_not():
    torch.manual_seed(3)
    codes = torch.randn(40, 16)
    codes[20:] = codes[:20] * 1.0001
    x = codes[torch.arange(500) % 20] + torch.randn(500, 16)
    judge = oracle.Oracle(x, codes)
    right = brute_force(x, codes)[0]
    twins = (right + 20) % 40
    assert judge.check_search(right, exact=True) == (1.0, 500)
    assert judge.check_search(twins, exact=False) == (0.0, 500) and 0 < judge.regret(twins) < 1e-3
    with pytest.raises(ValueError, match=r"equals float64 on 0\.0000%"):
        judge.check_search(twins, exact=True)
    with pytest.raises(ValueError, match="equals float64"):
        judge.check_search((right + 1) % 40, exact=False)


def test_a_peer_that_would_take_too_long_is_cut_off(tmp_path, monkeypatch, capsys):
    def right(codes, inputs):
        return lambda x: brute_force(x, codes)[0]

    table = [peers.Contender("vqkernels a", right, exact=True), peers.Contender("peer", right)]
    monkeypatch.setattr(run, "searches", lambda device, dtype, isas: table)
    words = ["--shapes", "320,40,8", "--rounds", "3", "--cases", "search", "--no-memory", "--cutoff", "1e-9"]
    bench = run.Bench(options.parse([*words, "--out", str(tmp_path / "out.jsonl")]))
    assert bench.go() == 0 and [record["name"] for record in bench.measured] == ["vqkernels a"]
    assert "skipped peer: search N=320 K=40 D=8 float32: a call would take about" in capsys.readouterr().out


@pytest.mark.skipif(not memory.supported(), reason="this system does not tell a process its peak")
def test_peak_memory_of_another_process():
    name = "torch.cdist + argmin"
    found = memory.extra_bytes(
        "search", (4096, 2048, 8), torch.float32, [name, "nobody", "chunked addmm + argmin"]
    )
    # one matrix and little else; the chunk is half of it
    assert 4 * 4096 * 2048 <= found[name] < 1.5 * 4 * 4096 * 2048
    assert found["nobody"] == Failure("StopIteration: ") and found["chunked addmm + argmin"] < found[name]


def test_who_is_lost_with_its_process_does_not_hide_the_rest(monkeypatch):
    calls = []

    def died(command, **given):
        names = json.loads(command[-1])["names"]
        calls.append(names)
        lines = [
            json.dumps({"name": name, "bytes": 5})
            for name in names[: names.index("b") if "b" in names else None]
        ]
        return subprocess.CompletedProcess(
            command, -9 if "b" in names else 0, "\n".join(["hello", *lines]), ""
        )

    monkeypatch.setattr(memory.subprocess, "run", died)
    found = memory.extra_bytes("search", (1, 1, 1), torch.float32, ["a", "b", "c"])
    assert found == {"a": 5, "b": Failure("its process ended with -9"), "c": 5} and calls == [
        ["a", "b", "c"],
        ["c"],
    ]


def measured(name, ms, case="search", shape=(4096, 512, 64), **fields):
    n, k, d = shape
    times = {"ms_p50": ms, "ms_min": ms, "ms_max": ms, "tflops": 2e-9 * n * k * d / ms}
    told = {"floor_tflops": 1.0, "peaks_tflops": {"float32": 0.5, "int16": 1.0}, "extra_mb": 3.0}
    told |= {
        "peers": {"faiss-cpu": "1.15.1"},
        "machine": "x86_64",
        "isa": "avx2",
        "threads": 2,
        "agreement": 1.0,
    }
    return {"case": case, "shape": list(shape), "dtype": "float32", "name": name} | times | told | fields


FOUND = [
    measured("vqkernels native", 2.0),
    measured("faiss-cpu IndexFlatL2", 8.0, agreement=0.9999999),
    measured("vqkernels native", 2.0, shape=(64, 32, 8)),
    measured("faiss-cpu IndexFlatL2", 1.0, shape=(64, 32, 8)),
    measured("pykeops", 30.0, shape=(64, 32, 8)),
    measured("vqkernels diveq", 5.0, case="layer"),
    measured("vqkernels sf_diveq", 10.0, case="layer"),
    measured("diveq DIVEQ", 50.0, case="layer", extra_mb=1234.0),
    measured("diveq SFDIVEQ", 60.0, case="layer", extra_mb=0.2),
]


def test_the_summary():
    found = {(each["name"], each["over"]): each for each in summary.summaries(FOUND, {"commit": "abc"})}
    assert list(found) == [
        ("vqkernels native", "faiss-cpu IndexFlatL2"),
        ("vqkernels diveq", "diveq DIVEQ"),
        ("vqkernels sf_diveq", "diveq SFDIVEQ"),
    ]
    first = found["vqkernels native", "faiss-cpu IndexFlatL2"]
    assert first["ratios"] == {"4096,512,64": 4.0, "64,32,8": 0.5} and first["commit"] == "abc"
    assert first["geometric_mean"] == round(2**0.5, 3) and first["least"] == 0.5
    assert (
        "1.41x faiss-cpu IndexFlatL2 over 2 shapes (4.00, 0.50), at least 0.50x, at 64,32,8"
        in summary.line(first)
    )
    assert found["vqkernels sf_diveq", "diveq SFDIVEQ"]["least"] == 6
    assert summary.summaries([], {}) == []


def test_summaries_are_read_and_are_no_measurements(tmp_path):
    records.append(tmp_path / "a.jsonl", [*FOUND, *summary.summaries(FOUND, {})])
    found, malformed = records.read(tmp_path / "a.jsonl")
    assert malformed == 0 and len(found) == len(FOUND) + 3 and len(records.timed(found)) == len(FOUND)


def test_the_tables_of_the_readme(tmp_path):
    text = readme.markdown(FOUND, root=tmp_path)
    flat = " ".join(text.split())
    assert "2 cores (x86_64, avx2)" in flat and "500 in float32, 1000 in int16" in flat
    lines = text.splitlines()
    assert "| search (N, K, D) | ours, exact | of the peak | faiss-cpu 1.15.1 | pykeops |" in lines
    assert "| (4096, 512, 64) | 2 ms | 13 % | 4.0x | - |" in lines
    assert "| (64, 32, 8) | 2 ms | 0 % | **0.50x** | 15x |" in lines
    assert "| geometric mean | 1x |  | 1.41x | 15x (of 1) |" in lines
    # never rounded up to all rows
    assert "| equal to float64 | 100 % |  | 99.999 % | 100 % |" in lines
    assert "| (4096, 512, 64) | 5 ms, 3 MB | 10 ms, 3 MB | 10x, 1.2 GB | 6.0x, < 1 MB |" in lines
    assert readme.markdown([]) == ""
    assert readme.NOTE not in text and readme.EMA not in flat


def test_the_tables_mark_medians_of_few_calls(tmp_path):
    ema = measured("vector-quantize-pytorch (EMA)", 50.0, case="layer", rounds=2)
    found = [*FOUND, ema, measured("pykeops", 30.0, shape=(64, 32, 8), rounds=1)]
    text = readme.markdown(found, root=tmp_path)
    assert "| (64, 32, 8) | 2 ms | 0 % | **0.50x** | 15x † |" in text and "| 10x †, 3 MB |" in text
    assert text.count(readme.NOTE) == 2 and readme.EMA in " ".join(text.split())


@pytest.mark.parametrize(
    ("name", "opening"),
    [("bench", "Medians"), ("all benches", "Medians"), ("memory", "| forward + backward")],
)
def test_the_tables_replace_what_is_between_the_marks(name, opening, tmp_path, capsys):
    file, results = tmp_path / "README.md", tmp_path / "cpu.jsonl"
    begin, end = readme.marks(name)
    records.append(results, FOUND)
    file.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    words = [str(file), "--results", str(results)]
    assert readme.main(words) == 0
    once = file.read_text()
    assert once.startswith(f"before\n{begin}\n{opening}") and once.endswith(f"|\n{end}\nafter\n")
    assert ("| layer" in once) == (name == "all benches")
    assert readme.main(words) == 0 and file.read_text() == once
    file.write_text("no marks\n")
    assert readme.main(words) == 2 and file.read_text() == "no marks\n"
    assert "must hold the lines" in capsys.readouterr().err
    results.write_text("")
    assert readme.main(words) == 2


@pytest.mark.parametrize(
    ("path", "name"), [("README.md", "bench"), ("docs/speed.md", "all benches"), ("docs/memory.md", "memory")]
)
def test_the_documents_show_what_was_measured(path, name):
    whole, (begin, end) = (ROOT / path).read_text(), readme.marks(name)
    between = whole[whole.index(begin) + len(begin) : whole.index(end)].strip()
    found, malformed = records.read(ROOT / "bench/results/cpu.jsonl")
    assert malformed == 0 and between == readme.BLOCKS[name](found)


def test_the_figure_of_a_run(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    image = pytest.importorskip("PIL.Image")
    results, figure = tmp_path / "cpu.jsonl", tmp_path / "a.png"
    records.append(results, FOUND)
    assert figures.main(["--results", str(results), "--figure", str(figure)]) == 0
    # ratios of 3 searches and 2 layers, shares of 5, memory of 4
    assert "14 bars" in capsys.readouterr().out
    with image.open(figure) as drawn:
        assert drawn.width > 1000
    assert figures.main(["--results", str(tmp_path / "none"), "--figure", str(figure)]) == 2


def test_curves_span_two_decades():
    shapes = curves.shapes()
    for at, letter in enumerate("NKD"):
        sizes = [shape[at] for axis, shape in shapes if axis == letter]
        assert sizes == sorted(sizes) and sizes[-1] == 100 * sizes[0]
        others = {shape[:at] + shape[at + 1 :] for axis, shape in shapes if axis == letter}
        assert len(others) == 1
    assert curves.exponent([(x, 3 * x**1.5) for x in (1, 10, 50, 100)]) == pytest.approx(1.5)


def test_a_curve_is_measured_fitted_and_drawn(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(curves, "DECADES", 1)
    monkeypatch.setattr(curves, "FIXED", ((0, 20, 4), (30, 0, 4), (30, 20, 0)))
    # a peer that is always there
    monkeypatch.setattr(curves, "SHOWN", {"vqkernels reference": "ours", "torch.cdist + argmin": "cdist"})
    monkeypatch.setattr(curves, "OURS", "vqkernels reference")
    monkeypatch.setattr(run.memory, "supported", lambda: False)
    monkeypatch.setattr(curves, "shapes", lambda least, whole=curves.shapes: whole((30, 20, 4)))
    words = ["--out", str(tmp_path / "c.jsonl"), "--figure", str(tmp_path / "c.png"), "--each", "1e-3"]
    assert curves.main(words) == 0
    told = capsys.readouterr().out
    assert "vqkernels reference: time grows as N^" in told and "18 points in" in told
    found = records.read(tmp_path / "c.jsonl")[0]
    assert [each["axis"] for each in found] == [letter for letter in "NKD" for _ in range(6)]
    assert curves.main([*words, "--draw-only"]) == 0


def test_the_microbenchmarks_run(tmp_path):
    pytest.importorskip("pytest_benchmark")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "bench/micro",
        "--quick",
        "--benchmark-disable",
        "-p",
        "no:cacheprovider",
    ]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0 and ("passed" in ran.stdout or "%" in ran.stdout), ran.stdout + ran.stderr
