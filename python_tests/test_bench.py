"""The benches: what is timed was checked, what fails is said, and files of measurements are compared honestly."""

import json
import sys
import time
import types
from pathlib import Path

import pytest
import torch

from vqkernels import native
from vqkernels.testing import brute_force

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import compare  # noqa: E402
import records  # noqa: E402
import run  # noqa: E402

from vqkernels.profiling import peers, timing  # noqa: E402
from vqkernels.profiling.layers import _plain  # noqa: E402
from vqkernels.profiling.searches import _addmm, _cdist, _flash, addmm, chunk_rows  # noqa: E402
from vqkernels.profiling.timing import Failure, Floors, HostClock, attempt, interleaved  # noqa: E402

SHAPE = (300, 40, 8)


class Clock(HostClock):
    """A GPU's clock that needs none: every call takes a millisecond, or what it says."""

    def __init__(self, free=None):
        self.free, self.seen = free, []

    def time(self, run):
        run()
        return 1.0 + len(self.seen) % 3 / 100

    def extra_bytes(self, run):
        run()
        return 5_000_000

    def replayed(self, runs, rounds):
        for each in runs:
            each()
        return 0.25

    def floors(self, dtype):
        return Floors(flops=1e12, bandwidth=1e12, launch_ms=0.005, replay_ms=0.001)

    def free_bytes(self):
        return self.free


@pytest.fixture(autouse=True)
def _quick_floors(monkeypatch):
    monkeypatch.setattr(timing, "_HOST_SECONDS", 0.001)
    monkeypatch.setattr(timing, "_HOST_COPIED", 1 << 20)


def bench(tmp_path, *words, clock=None, shape=SHAPE):
    given = ["--shapes", ",".join(map(str, shape)), "--rounds", "3", "--out", str(tmp_path / "out.jsonl")]
    # memory is measured by other processes, which know nothing of stand-ins
    quiet = [] if clock is not None else ["--no-memory"]
    return run.Bench(run.parse([*given, *quiet, *words]), clock)


def written(tmp_path):
    found, malformed = records.read(tmp_path / "out.jsonl") if (tmp_path / "out.jsonl").exists() else ([], 0)
    assert malformed == 0
    return {record["name"]: record for record in found if record["case"] != "summary"}


def right(codes, inputs):
    return lambda x: brute_force(x, codes)[0]


def wrong(codes, inputs):
    return lambda x: (brute_force(x, codes)[0] + 1) % len(codes)


def broken(codes, inputs):
    raise RuntimeError("no such kernel\nand a long story")


def test_the_cpu_bench(tmp_path, capsys):
    assert bench(tmp_path).go() == 0
    found = written(tmp_path)
    assert {
        "vqkernels reference",
        "torch.cdist + argmin",
        "chunked addmm + argmin",
        "vqkernels sf_diveq",
    } <= set(found)
    assert ("vqkernels native" in found) == (native.MISSING is None)
    for record in found.values():
        assert 0 < record["ms_min"] <= record["ms_p50"] <= record["ms_max"] and record["rounds"] == 3
        assert record["shape"] == list(SHAPE) and record["dtype"] == "float32" and record["device"] == "cpu"
    assert found["vqkernels reference"]["agreement"] == 1
    assert "vqkernels reference" in capsys.readouterr().out


def test_what_is_wrong_or_fails_is_not_timed(tmp_path, monkeypatch, capsys):
    """Ours makes the run fail; a peer's failure is a line; everybody else is measured all the same."""
    table = [
        peers.Contender("vqkernels good", right, exact=True),
        peers.Contender("vqkernels bad", wrong, exact=True),
        peers.Contender("peer bad", wrong),
        peers.Contender("peer broken", broken),
    ]
    monkeypatch.setattr(run, "searches", lambda device, dtype, isas: table)
    assert bench(tmp_path, "--cases", "search").go() == 1
    assert list(written(tmp_path)) == ["vqkernels good"]
    told = capsys.readouterr().out
    assert (
        "FAILED vqkernels bad at search N=300 K=40 D=8 float32: ValueError: equals float64 on 0.0000%" in told
    )
    assert (
        "skipped peer bad" in told
        and "skipped peer broken" in told
        and "RuntimeError: no such kernel\n" in told
    )
    monkeypatch.setattr(
        run, "searches", lambda device, dtype, isas: [t for t in table if t.name != "vqkernels bad"]
    )
    assert bench(tmp_path, "--cases", "search").go() == 0


def test_a_device_clock_gives_shares_memory_and_replays(tmp_path, monkeypatch):
    table = [peers.Contender("vqkernels a", right, exact=True, captured=True), peers.Contender("peer", right)]
    monkeypatch.setattr(run, "searches", lambda device, dtype, isas: table)
    monkeypatch.setattr(run, "SHORT", 10.0)
    assert bench(tmp_path, "--cases", "search", clock=Clock()).go() == 0
    ours, peer = (written(tmp_path)[name] for name in ("vqkernels a", "peer"))
    n, k, d = SHAPE
    assert ours["peak_share"] == pytest.approx(2e3 * n * k * d / 1e12 / ours["ms_p50"], abs=1e-4)
    assert ours["tflops"] == pytest.approx(2e-9 * n * k * d / ours["ms_p50"], abs=1e-4)
    assert (
        ours["extra_mb"] == 5
        and ours["extra_latents"] == round(5e6 / (4 * n * d), 3)
        and ours["graph_ms"] == 0.25
        and ours["launch_floor_ms"] == 0.005
    )
    assert ours["floor_tflops"] == 1 and "graph_ms" not in peer


def test_what_does_not_fit_is_skipped_with_the_reason(tmp_path, monkeypatch, capsys):
    table = [
        peers.Contender("vqkernels a", right, exact=True),
        peers.Contender("peer", right, bytes_per_pair=4),
    ]
    monkeypatch.setattr(run, "searches", lambda device, dtype, isas: table)
    assert bench(tmp_path, "--cases", "search", clock=Clock(free=40_000)).go() == 0
    assert list(written(tmp_path)) == ["vqkernels a"]
    assert (
        "skipped peer: search N=300 K=40 D=8 float32: it would need 0 GB of 0 GB" in capsys.readouterr().out
    )


def test_a_peer_that_takes_all_the_time_is_skipped(tmp_path, monkeypatch, capsys):
    def slow(codes, inputs):
        return lambda x: time.sleep(0.4 * (len(x) == 300)) or right(codes, inputs)(x)

    table = [peers.Contender("vqkernels a", slow, exact=True), peers.Contender("peer", slow)]
    monkeypatch.setattr(run, "searches", lambda device, dtype, isas: table)
    monkeypatch.setattr(run, "SLOW", 0.1)
    assert bench(tmp_path, "--cases", "search", "--budget", "1.9").go() == 0
    assert list(written(tmp_path)) == ["vqkernels a"]
    assert "skipped peer: search N=300 K=40 D=8 float32: one call took 0." in capsys.readouterr().out


def test_a_spent_budget_skips_cases_and_says_so(tmp_path, capsys):
    made = bench(tmp_path, "--budget", "1e-9")
    assert made.go() == 0 and written(tmp_path) == {}
    assert capsys.readouterr().out.count("no time left") == 2


def test_after_a_lost_device_another_process_goes_on_without_the_culprit(tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(run.os, "execv", lambda program, words: calls.append(words))
    monkeypatch.setattr(sys, "argv", ["bench/run.py", "--device", "cuda"])
    made = bench(tmp_path, "--budget", "100")
    made.number = 3
    made.restart(peers.Contender("vqkernels native fast", right))
    assert calls[0][1:3] == ["bench/run.py", "--device"]
    assert calls[0][4:-1] == ["--avoid", "vqkernels native", "--first", "3", "--budget"]
    # what is left out counts as failed, and the cases before are not measured again
    assert bench(tmp_path, "--avoid", "vqkernels native", "--first", "1").go() == 1
    assert {record["case"] for record in written(tmp_path).values()} == {"layer"}
    assert "FAILED vqkernels native: the device was lost" in capsys.readouterr().out


def test_rounds_are_interleaved_and_fill_the_time():
    order = []
    runs = {name: (lambda name=name: order.append(name)) for name in "ab"}
    times, failed = interleaved(HostClock(), runs, rounds=4)
    assert order == ["a", "b"] * 5 and {name: len(t) for name, t in times.items()} == {"a": 4, "b": 4}
    assert failed == {}
    few, _ = interleaved(HostClock(), runs, seconds=0)
    many, _ = interleaved(HostClock(), runs, seconds=60)
    assert len(few["a"]) == 5 and len(many["a"]) == 60

    def fails_later():
        order.append("c")
        if order.count("c") > 2:
            raise ValueError("gone")

    times, failed = interleaved(HostClock(), {"c": fails_later, **runs}, rounds=4)
    assert list(times) == ["a", "b"] and failed == {"c": "ValueError: gone"}


def test_attempts_tell_in_one_line():
    assert attempt(lambda: 3) == 3
    assert attempt(lambda: 1 / 0) == Failure("ZeroDivisionError: division by zero")


def test_flash_kmeans_is_called_as_its_signature_wants(monkeypatch):
    """Without the package, by a stand-in with the signature of version 0.3.1."""
    calls = []

    def euclid_assign_triton(x, centroids, x_sq, out=None, c_sq=None, *, use_heuristic=True):
        assert x.shape[0] == centroids.shape[0] == 1 and x_sq.shape == x.shape[:2]
        assert c_sq is None or (c_sq.shape == centroids.shape[:2] and c_sq.dtype == torch.float32)
        calls.append(x_sq.dtype)
        distance = (
            x_sq.double()[..., None]
            + (centroids.double() ** 2).sum(-1)
            - 2 * x.double() @ centroids.double().mT
        )
        return distance.argmin(-1).int()

    stand_in = types.ModuleType("flash_kmeans.assign_euclid_triton")
    stand_in.euclid_assign_triton = euclid_assign_triton
    monkeypatch.setitem(sys.modules, "flash_kmeans", types.ModuleType("flash_kmeans"))
    monkeypatch.setitem(sys.modules, "flash_kmeans.assign_euclid_triton", stand_in)
    x, codes = torch.randn(50, 8).bfloat16(), torch.randn(20, 8).bfloat16()
    for given, dtype in ((False, torch.bfloat16), (True, torch.float32)):
        found = _flash(given)(codes, [x])(x)
        # norms that were rounded to bfloat16 are the same for all codes of a row
        assert torch.equal(found.long(), brute_force(x, codes)[0])
        assert calls.pop() == dtype


def test_plain_peers_are_what_they_say():
    x, codes = torch.randn(100, 8), torch.randn(33, 8)
    expected, least = brute_force(x, codes)
    for make in (_cdist, _addmm(False)):
        assert torch.equal(make(codes, [x])(x), expected)
    half = codes.square().sum(1) / 2
    assert torch.equal(addmm(x, codes, half, 7), addmm(x, codes, half, 1000))
    z, gx, gc = peers.step(_plain(False)(codes, [x]), x, torch.ones_like(x))
    torch.testing.assert_close((z - x).norm(dim=1), least.sqrt().float(), rtol=1e-5, atol=1e-6)
    # what a code gets, its latents lose
    torch.testing.assert_close(gx.sum(0) + gc.sum(0), torch.ones_like(x).sum(0), rtol=1e-4, atol=1e-4)
    assert chunk_rows(1 << 20, 1024, torch.device("cuda")) == 1 << 15
    assert chunk_rows(131072, 65536, torch.device("cuda")) == 4096


def measured(name, ms, *, spread=0.01, case="search", shape=SHAPE, **fields):
    record = {"case": case, "shape": list(shape), "dtype": "bfloat16", "name": name, "tflops": 2e3 / ms}
    times = {"ms_p50": ms, "ms_min": ms * (1 - spread), "ms_max": ms * (1 + spread)}
    return record | times | {"floor_tflops": 788.0, "device": "a"} | fields


def files(tmp_path, old, new):
    paths = tmp_path / "old.jsonl", tmp_path / "new.jsonl"
    for path, found in zip(paths, (old, new), strict=True):
        path.write_text("".join(text if isinstance(text, str) else json.dumps(text) + "\n" for text in found))
    return [str(path) for path in paths]


@pytest.mark.parametrize(
    ("old", "new", "status"),
    [
        (measured("vqkernels a", 10), measured("vqkernels a", 10.4), 0),
        (measured("vqkernels a", 10), measured("vqkernels a", 10.6), 1),
        (measured("vqkernels a", 10), measured("vqkernels a", 5), 0),
        # within what the rounds of the old or of the new file spread
        (measured("vqkernels a", 10, spread=0.2), measured("vqkernels a", 11), 0),
        (measured("vqkernels a", 10), measured("vqkernels a", 11, spread=0.2), 0),
        # somebody else's
        (measured("flash-kmeans", 10), measured("flash-kmeans", 20), 0),
    ],
)
def test_a_regression_is_more_than_the_spread(tmp_path, capsys, old, new, status):
    assert compare.main(files(tmp_path, [old], [new])) == status
    assert ("regression: search 300,40,8 bfloat16 vqkernels a: 1.060x" in capsys.readouterr().out) == (
        status == 1
    )


def test_the_last_of_several_measurements_counts(tmp_path):
    old = [measured("vqkernels a", 1), measured("vqkernels a", 10)]
    assert compare.main(files(tmp_path, old, [measured("vqkernels a", 10)])) == 0


def test_other_dtypes_and_shapes_are_other_measurements(tmp_path, capsys):
    old = [
        measured("vqkernels a", 1, dtype="float32"),
        measured("vqkernels a", 10),
        measured("vqkernels b", 3),
    ]
    new = [measured("vqkernels a", 10), measured("vqkernels a", 5, shape=(1, 2, 3))]
    assert compare.main(files(tmp_path, old, new)) == 0
    told = capsys.readouterr().out
    assert (
        "only in OLD: 2 measurements, 2 of ours" in told and "only in NEW: 1 measurements, 1 of ours" in told
    )


def test_lines_that_are_no_measurements(tmp_path, capsys):
    broken_lines = [
        '{"case": "search"\n',
        "[1, 2]\n",
        '{"case": "search", "shape": [1, 2], "name": "x"}\n',
        "\n",
    ]
    broken_lines.append(json.dumps(measured("vqkernels a", 10) | {"ms_p50": "fast"}) + "\n")
    broken_lines.append(json.dumps(measured("vqkernels a", 10) | {"ms_min": -1}) + "\n")
    count = {
        "case": "agreement",
        "shape": [100, 4, 8],
        "dtype": "bfloat16",
        "name": "vqkernels a",
        "rows_wrong": 0,
    }
    good = measured("vqkernels a", 10)
    assert compare.main(files(tmp_path, [*broken_lines, count, good], [good])) == 0
    assert "old.jsonl: 5 lines are no measurements" in capsys.readouterr().err


def test_nothing_to_compare(tmp_path, capsys):
    paths = files(tmp_path, [measured("vqkernels a", 10)], [measured("vqkernels b", 10)])
    assert compare.main(paths) == 2
    assert "must share a measurement; got none in common" in capsys.readouterr().err
    assert compare.main([paths[0], str(tmp_path / "none")]) == 2
    (tmp_path / "empty.jsonl").write_text("")
    assert compare.main([paths[0], str(tmp_path / "empty.jsonl")]) == 2
    assert compare.main([str(tmp_path / "empty.jsonl"), "--figure", str(tmp_path / "f.png")]) == 2
    with pytest.raises(SystemExit):
        compare.main([paths[0]])


def test_fields_that_had_other_names(tmp_path):
    old = measured("vqkernels a", 10, tensor_share=0.5, hbm_tbs=4.0, tensor_floor_tflops=700.0)
    del old["floor_tflops"]
    paths = files(tmp_path, [old], [measured("vqkernels a", 10)])
    (record,) = records.read(Path(paths[0]))[0]
    assert (record["peak_share"], record["copy_tbs"], record["floor_tflops"]) == (0.5, 4.0, 700.0)
    assert compare.main(paths) == 0 and "50%" in records.table([record])


def test_lines_of_before_there_were_dtypes(tmp_path):
    old = {key: value for key, value in measured("vqkernels a", 10).items() if key != "dtype"}
    assert compare.main(files(tmp_path, [old], [measured("vqkernels a", 20, dtype="float32")])) == 1


@pytest.mark.parametrize("floors", [True, False])
def test_the_figure(tmp_path, capsys, floors):
    pytest.importorskip("matplotlib")
    image = pytest.importorskip("PIL.Image")
    old = [
        measured(name, 10 + i + d / 100, case=case, shape=(4096, 512, d))
        for case in ("search", "layer")
        for i, name in enumerate(("vqkernels a", "vqkernels b", "peer"))
        for d in (8, 64, 256)
    ]
    new = [record | {"tflops": record["tflops"] * 1.3} for record in old]
    if not floors:
        old, new = ([r | {"floor_tflops": None} for r in found] for found in (old, new))
    path = tmp_path / "roofline.png"
    assert compare.main([*files(tmp_path, old, new), "--figure", str(path)]) == 0
    assert "36 points in" in capsys.readouterr().out
    with image.open(path) as drawn:
        assert drawn.width > 800 and len(drawn.convert("RGB").getcolors(1 << 20)) > 20


def test_the_table():
    found = [
        measured("vqkernels triton", 0.5, peak_share=0.75),
        measured("flash-kmeans", 2.0, peak_share=0.2),
    ]
    found.append(measured("vqkernels triton", 7.0, shape=(9, 8, 7)))
    lines = records.table(found).splitlines()
    assert lines[0].startswith("search bfloat16") and lines[1].split() == ["N,K,D", "triton", "flash"]
    assert lines[2].split() == ["300,40,8", "0.5", "75%", "2", "20%"]
    assert lines[3].split() == ["9,8,7", "7", "-"]
    count = {
        "case": "agreement",
        "shape": [100, 4, 8],
        "dtype": "bfloat16",
        "name": "vqkernels a",
        "rows_wrong": 0,
    }
    assert records.table([count]) == "vqkernels a bfloat16: 0 of 100 rows differ from float64"
    assert records.table([]) == ""
