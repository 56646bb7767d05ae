"""The bench of the installed package: checked results, a table, numbers as JSON and pictures."""

import dataclasses
import json
import time

import pytest
import torch

from vqkernels.__main__ import main
from vqkernels.profiling import (
    Benchmark,
    Measurement,
    bars,
    benchmark,
    format_table,
    measuring,
    memory,
    roofline,
    timing,
)
from vqkernels.profiling.machine import moved_bytes, operations
from vqkernels.profiling.peers import Contender
from vqkernels.profiling.timing import Floors

CPU = torch.device("cpu")
SHAPE = (70, 12, 5)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(timing, "_HOST_SECONDS", 0.001)
    monkeypatch.setattr(timing, "_HOST_COPIED", 1 << 20)
    monkeypatch.setattr(timing, "_SETTLED", 0.0)
    # processes of their own are tested with the benches
    monkeypatch.setattr(memory, "supported", lambda: False)


def listed(monkeypatch, *table):
    monkeypatch.setattr(measuring, "searches", lambda device, dtype, backends: list(table))


def right(codes, inputs):
    return lambda x: torch.cdist(x.double(), codes.double()).argmin(1)


def wrong(codes, inputs):
    return lambda x: torch.zeros(len(x), dtype=torch.int64)


def made(case="search", names=("vqkernels native", "peer")):
    found = Benchmark(
        CPU, torch.float32, Floors(flops=2e12, bandwidth=5e10, kinds={"float32": 1e12, "int16": 2e12})
    )
    found.facts = {"device": "cpu", "cpu": "a CPU", "machine": "x", "threads": 2, "torch": "2"}
    for at, name in enumerate(names):
        ms = 1.0 + at
        found.measurements.append(
            Measurement(
                case, (100, 20, 4), "float32", name, not at, ms, ms / 2, 2 * ms, 5, 1e9, 1e8, 0.1, 3.0 + at
            )
        )
    return found


def test_the_command_prints_a_table_and_writes_numbers_and_pictures(tmp_path, capsys):
    words = ["bench", "--shapes", "70x12x5", "--peers", "cdist", "--seconds", "2"]
    assert (
        main([*words, "--json", str(tmp_path / "new/found.json"), "--out", str(tmp_path / "pictures")]) == 0
    )
    printed = capsys.readouterr().out
    for word in (
        "nearest code: N=70 K=12 D=5 float32",
        "vqkernels",
        "torch.cdist + argmin",
        "all rows",
        "GB/s",
    ):
        assert word in printed
    assert "layer, forward + backward" in printed and "within bounds" in printed
    stored = json.loads((tmp_path / "new/found.json").read_text())
    names = {(each["case"], each["name"]) for each in stored["measurements"]}
    assert ("search", "torch.cdist + argmin") in names and ("layer", "vqkernels diveq") in names
    for each in stored["measurements"]:
        assert 0 < each["ms_min"] <= each["ms"] <= each["ms_max"] and each["shape"] == list(SHAPE)
        assert each["flops"] == pytest.approx(1e3 * 2 * 70 * 12 * 5 / each["ms"])
    for name in ("search-roofline", "search-bars", "layer-roofline", "layer-bars"):
        path = tmp_path / f"pictures/{name}.png"
        assert path.read_bytes().startswith(b"\x89PNG") and str(path) in printed


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--shapes", "4x4"], "bench: shapes must be NxKxD, numbers above 0; got '4x4'. Pass 65536x1024x64."),
        (["--shapes", "4x0x4"], "bench: shapes must be NxKxD, numbers above 0; got '4x0x4'."),
        (["--seconds", "0"], "bench: seconds must be above 0; got 0.0."),
        (["--peers", "nobody"], "benchmark: peers must be among those known here ("),
        (["--peers", "none", "faiss"], "bench: peers must be none alone, or parts of names; got none faiss."),
        (
            ["--shapes", "99999999999x99999999x9999"],
            "benchmark: shapes must fit into memory; got 99999999999x99999999x9999, which takes ",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(words, told, tmp_path, capsys):
    assert main(["bench", *words, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {told}") and error.count("\n") == 1


def test_files_that_cannot_be_are_refused_before_anything_is_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(timing.HostClock, "floors", None)
    (tmp_path / "file").touch()
    tiny = ["bench", "search", "--shapes", "1x1x1"]
    assert main([*tiny, "--out", str(tmp_path / "file")]) == 2
    assert "error: bench: out must be a folder that can be written; got " in capsys.readouterr().err
    assert main([*tiny, "--out", str(tmp_path), "--json", str(tmp_path / "file/x.json")]) == 2
    told = capsys.readouterr().err
    assert "error: bench: json must lie in a folder that can be written; got " in told
    assert told.endswith("Pass another --json.\n")
    assert main([*tiny, "--out", str(tmp_path), "--json", str(tmp_path)]) == 2
    assert f"bench: json must be a file; got {tmp_path}, a folder. Pass --json" in capsys.readouterr().err


def test_an_interrupted_bench_leaves_nothing(tmp_path, capsys, monkeypatch):
    def interrupted(*words, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr("vqkernels.cli.bench.benchmark", interrupted)
    assert main(["bench", "--out", str(tmp_path), "--json", str(tmp_path / "found.json")]) == 130
    assert capsys.readouterr().err == "Stopped by SIGINT: nothing is half-written.\n"
    assert not list(tmp_path.iterdir())


def test_nothing_measured_is_no_success(tmp_path, capsys):
    words = ["bench", "search", "--shapes", "70x12x5", "--backends", "triton", "--peers", "none"]
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        assert main([*words, "--out", str(tmp_path)]) == 1
    assert "vqkernels triton (search): " in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_bench_needs_no_training_package_and_says_what_it_needs(monkeypatch, capsys):
    import vqkernels.cli.info as info

    find, gone = info.importlib.util.find_spec, {"accelerate", "skimage"}
    monkeypatch.setattr(info.importlib.util, "find_spec", lambda name: None if name in gone else find(name))
    assert main(["bench", "--shapes", "1"]) == 2
    assert "shapes must be" in capsys.readouterr().err
    gone.add("matplotlib")
    assert main(["bench"]) == 2
    assert 'matplotlib not installed; run pip install "vqkernels[bench]"' in capsys.readouterr().err


def test_a_wrong_result_is_no_measurement(monkeypatch):
    def broken(codes, inputs):
        return lambda x: 1 / 0

    listed(
        monkeypatch,
        Contender("vqkernels good", right, exact=True),
        Contender("vqkernels bad", wrong, exact=True),
        Contender("peer bad", wrong),
        Contender("peer broken", broken),
        Contender("peer large", right, bytes_per_pair=1e18),
    )
    found = benchmark([("search", SHAPE)], device=CPU, dtype=torch.float32, seconds=2)
    assert [each.name for each in found.measurements] == ["vqkernels good"]
    reasons = {each.name: each for each in found.skipped if each.shape}
    assert "equals float64 on" in reasons["vqkernels bad"].reason and reasons["vqkernels bad"].failed
    assert "ZeroDivisionError" in reasons["peer broken"].reason and reasons["peer bad"].failed
    assert "it would need" in reasons["peer large"].reason and not reasons["peer large"].failed
    assert found.measurements[0].agreement == 1 and found.measurements[0].agreement_rows == 70


def test_a_wrong_result_of_ours_is_the_exit_status(monkeypatch, tmp_path, capsys):
    listed(monkeypatch, Contender("vqkernels bad", wrong, exact=True))
    assert main(["bench", "search", "--shapes", "70x12x5", "--out", str(tmp_path)]) == 1
    assert "vqkernels bad (search at 70x12x5): ValueError: equals float64 on" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_who_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(measuring, "missing", lambda device: ["pykeops", "diveq"])
    listed(monkeypatch, Contender("vqkernels good", right, exact=True))
    found = benchmark([("search", SHAPE)], device=CPU, dtype=torch.float32, seconds=1)
    assert {each.name: each.reason for each in found.skipped} == {
        "pykeops": "not installed",
        "diveq": "not installed",
    }
    assert "  pykeops (search): not installed" in format_table(found)


def test_a_backend_that_cannot_run_is_named():
    cases = [("search", SHAPE)]
    found = benchmark(
        cases, device=CPU, dtype=torch.float32, backends=["triton", "reference"], peers=(), seconds=1
    )
    assert [each.name for each in found.measurements] == ["vqkernels reference"]
    assert [(each.name, "cuda device" in each.reason) for each in found.skipped] == [
        ("vqkernels triton", True)
    ]


def test_what_takes_too_long_is_left_out(monkeypatch):
    def slow(codes, inputs):
        def search(x):
            time.sleep(0.4)
            return right(codes, inputs)(x)

        return search

    listed(monkeypatch, Contender("vqkernels good", right, exact=True), Contender("peer", slow))
    found = benchmark([("search", SHAPE)], device=CPU, dtype=torch.float32, seconds=3)
    assert [each.name for each in found.measurements] == ["vqkernels good"]
    assert "a call would take about" in found.skipped[-1].reason


def test_operations_and_bytes():
    assert operations((10, 3, 4)) == 240
    # x and codes, and an index and a distance of each row
    assert moved_bytes("search", (10, 3, 4), 2) == 2 * (40 + 12) + 12 * 10
    assert moved_bytes("layer", (10, 3, 4), 4) == 4 * (5 * 40 + 2 * 12) + 12 * 10


def test_pictures_of_any_size():
    many = tuple(f"contender {i}" for i in range(14))
    for case, names in (("search", ("vqkernels native",)), ("layer", many)):
        found = made(case, names)
        for draw in (roofline, bars):
            assert draw(found, case).startswith(b"\x89PNG")
    found = made()
    found.floors = Floors()
    assert roofline(found, "search").startswith(b"\x89PNG")


def test_numbers_survive_json():
    found = made()
    stored = json.loads(json.dumps(found.to_dict()))
    again = Measurement(**(stored["measurements"][1] | {"shape": tuple(stored["measurements"][1]["shape"])}))
    assert again == found.measurements[1]


def test_numbers_of_a_table_have_no_exponent():
    found = made()
    slow = dataclasses.replace(found.measurements[1], ms=1234.5, ms_min=1001.0, ms_max=20400.0)
    found.measurements[1] = slow
    table = format_table(found)
    # 1234.5 ms beside 1 ms
    assert "1234" in table and "(1001 to 20400)" in table and "1234.50x" in table and "e+0" not in table


def test_a_case_gets_time_whatever_those_before_it_took():
    assert measuring._part(30.0, 0.0, 0, 3) == 10.0
    assert measuring._part(30.0, 5.0, 1, 3) == 12.5
    # a loaded machine: both before it have used all
    assert measuring._part(30.0, 42.0, 2, 3) == 5.0
