"""The bench of other libraries' models: both sides train alike, what is written is drawn and tabulated."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from vqkernels.profiling import memory
from vqkernels.train.data.pictures import Parts, Picture

pytest.importorskip("vector_quantize_pytorch")
pytest.importorskip("diveq")
sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))

import adoption
import adoption_report
from strangers import CASES

NAMES = ["vq", "diveq"]


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    """What a run of three steps in tiny sizes writes; the process that measures memory is not started."""
    out = tmp_path_factory.mktemp("adoption") / "adoption.jsonl"
    pixels = np.random.default_rng(0).integers(256, size=(32, 32, 3), dtype=np.uint8)
    parts = Parts(*([Picture(name, 32, 32, pixels=pixels)] for name in ("training", "held out")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "supported", lambda: False)
        patch.setattr(adoption, "decoded", lambda: parts)
        words = ["--tiny", "--steps", "3", "--rounds", "1", "--out", str(out), "--cases", *NAMES]
        assert adoption.main(words) == 0
    return [json.loads(text) for text in out.read_text().splitlines()]


def test_both_sides_of_every_model_are_written(lines):
    assert [(line["name"], line["side"]) for line in lines] == [(n, s) for n in NAMES for s in adoption.SIDES]
    assert all(len(line["losses"]) == 3 and line["psnr"] > 0 and line["step_ms"] > 0 for line in lines)


def test_first_losses_agree(lines):
    for before, after in zip(lines[::2], lines[1::2], strict=True):
        # vq searches the same codes; what diveq's noise of 1e-3 adds to a latent is not the same draw
        bound = 1e-5 if before["name"] == "vq" else 1e-2
        assert after["losses"][0] == pytest.approx(before["losses"][0], rel=bound)


def test_targets_that_are_missed_are_named(lines):
    bound = next(case.name for case in CASES if case.bound)
    pair = [dict(line, name=bound) for line in lines[:2]]
    pair[0] |= {"quantizer_ms": 9.0, "quantizer_mb": 100.0}
    pair[1] |= {"quantizer_ms": 1.0, "quantizer_mb": 5.0}
    assert adoption.missed(pair) == [f"{bound}: quantizer_ms 9.0 -> 1.0, less than 10 times"]
    assert adoption.missed(lines) == []


def test_a_run_becomes_a_table_and_a_picture(lines, tmp_path):
    text = adoption_report.markdown(lines)
    assert "VectorQuantize" in text and "DIVEQ" in text
    page = tmp_path / "page.md"
    page.write_text(f"head\n{adoption_report.BEGIN}\nold\n{adoption_report.END}\ntail\n")
    results = tmp_path / "results.jsonl"
    results.write_text("".join(json.dumps(line) + "\n" for line in lines))
    figure = tmp_path / "figure.png"
    front = tmp_path / "front.md"
    front.write_text(f"{adoption_report.BEGIN}\n{adoption_report.END}\n")
    words = ["--results", str(results), "--figure", str(figure), "--readme", str(front)]
    assert adoption_report.main([str(page), *words]) == 0
    assert page.read_text() == f"head\n{adoption_report.BEGIN}\n{text}\n{adoption_report.END}\ntail\n"
    assert figure.stat().st_size > 10_000
    assert "a step of the quantizer alone" in front.read_text()


def test_the_sentence_is_about_the_most_codes(lines):
    pairs = [dict(line, shape=[8, 10 if line["name"] == "vq" else 20, 4]) for line in lines]
    for line in pairs[2:]:
        before = line["side"] == "before"
        line |= {"quantizer_ms": 40.0 if before else 4.0, "quantizer_mb": 100.0 if before else 2.0}
    said = " ".join(adoption_report.sentence(pairs).split())
    assert "K = 20" in said and "diveq's 10x less time and 50x less memory" in said
    assert "vector-quantize-pytorch" not in said
