"""The tables of quantizers say what the code registers and what was measured, and nothing else."""

import sys
from pathlib import Path

import pytest
from conftest import INTERPRETED

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import family  # noqa: E402
import quantizers  # noqa: E402
import readme  # noqa: E402
import records  # noqa: E402

from vqkernels.nn import METHODS  # noqa: E402

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the documents speak of the compiled backends")


@pytest.mark.parametrize("name", ["docs/quantizers.md", "docs/papers.md"])
def test_the_documents_hold_the_tables(name):
    whole, found = (ROOT / name).read_text(), 0
    for block, text in family.texts().items():
        begin, end = readme.marks(block)
        if begin in whole:
            found += 1
            assert whole[whole.index(begin) + len(begin) : whole.index(end)].strip() == text, block
    assert found


def test_every_method_says_when_and_whence():
    for name, method in METHODS.items():
        assert 10 < len(method.summary) <= 110 and not method.summary.endswith("."), name
        assert method.source, name


def test_every_method_was_measured_within_its_target():
    """What misses the target is named here, so that nothing becomes slow in silence."""
    measured = {each["name"]: each for each in records.read(quantizers.OUT)[0]}
    assert set(measured) == set(METHODS)
    late = {name for name, one in measured.items() if one["over_diveq"] > quantizers.MOST_TIMES}
    assert late <= set(quantizers.FREE)
    assert all(one["extra_mb"] <= quantizers.MOST_MB for one in measured.values())


def test_a_file_without_a_place_is_refused(tmp_path, capsys):
    path = tmp_path / "a.md"
    path.write_text("nothing\n")
    assert family.main([str(path)]) == 2 and path.read_text() == "nothing\n"
    assert "must hold a block" in capsys.readouterr().err
