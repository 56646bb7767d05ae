"""Every Python block of the documents runs, in order, in one namespace per document."""

import re
from pathlib import Path

import pytest
from conftest import INTERPRETED

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(INTERPRETED, reason="the documents speak of the compiled backends")
@pytest.mark.parametrize("name", ["README.md", "docs/quantizers.md"])
def test_python_blocks(name):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), flags=re.DOTALL)
    assert blocks, f"{name} has no example"
    namespace = {}
    for block in blocks:
        exec(compile(block, name, "exec"), namespace)


def test_links_lead_somewhere():
    for name in ("README.md", "CONTRIBUTING.md"):
        for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / name).read_text()):
            assert target.startswith("http") or (ROOT / target).exists(), f"{name}: {target}"
