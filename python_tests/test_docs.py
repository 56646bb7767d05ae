"""What the documents show runs: Python blocks, command lines, targets, paths; and the pages are built in silence."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import INTERPRETED

from vqkernels import __main__ as command_line
from vqkernels.nn import METHODS

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
# what a page may import that only some machines have
PEERS = r"^(?:from|import) (vector_quantize_pytorch|diveq)\b"
TRAINABLE = all(importlib.util.find_spec(name) for name in ("accelerate", "PIL", "skimage", "tyro"))
pytestmark = pytest.mark.skipif(INTERPRETED, reason="the documents speak of the compiled backends")


def name_of(path):
    return str(path.relative_to(ROOT))


def holding(language):
    """Pages with a block of a language."""
    found = [page for page in PAGES if f"\n```{language}\n" in page.read_text()]
    return pytest.mark.parametrize("page", found, ids=name_of)


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def commands(page):
    """Words of every command of a page, without comments."""
    for block in blocks(page, "sh"):
        for line in block.splitlines():
            lexer = shlex.shlex(line, posix=True, punctuation_chars="&;|")
            lexer.whitespace_split, words = True, []
            for word in lexer:
                if word in ("&&", ";", "|"):
                    yield words
                    words = []
                else:
                    words.append(word)
            if words:
                yield words


@pytest.fixture
def _as_before(monkeypatch, tmp_path):
    """Short names that a page registers and files that it writes are gone after it."""
    before = dict(METHODS)
    monkeypatch.chdir(tmp_path)
    yield
    METHODS.clear()
    METHODS.update(before)


@pytest.mark.usefixtures("_as_before")
@holding("python")
def test_python_blocks_run(page):
    """In their order, in one namespace for a page."""
    for peer in set(re.findall(PEERS, "\n".join(blocks(page, "python")), re.MULTILINE)):
        pytest.importorskip(peer)
    parser = pytest.importorskip("sybil.parsers.markdown").PythonCodeBlockParser()
    document = importlib.import_module("sybil.document").Document.parse(str(page), parser)
    examples = list(document.examples())
    assert len(examples) == len(blocks(page, "python"))
    for example in examples:
        example.evaluate()


@holding("diff")
def test_new_import_lines_import(page):
    for block in blocks(page, "diff"):
        lines = re.findall(r"^\+ (.*)$", block, re.MULTILINE)
        assert lines
        exec(compile("\n".join(lines), name_of(page), "exec"), {})


@holding("sh")
def test_commands_are_those_there_are(page, monkeypatch):
    """Targets of make exist, files exist, and the command line takes every line, without running it."""
    makefile = (ROOT / "Makefile").read_text()
    for words in commands(page):
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), words
        elif "-m" in words and words[words.index("-m") + 1] == "vqkernels":
            if TRAINABLE:
                check_line(words[words.index("-m") + 2 :], monkeypatch)
        elif words[0] == "python":
            assert (ROOT / words[1]).exists(), words
        else:
            assert words[0] == "pip", words


def check_line(words, monkeypatch):
    """The command line understands these words."""
    called = []

    def instead(name, command):
        # the parser reads a signature through what it wraps
        def noted(*args, **kwargs):
            called.append(name)
            return 0

        noted.__wrapped__, noted.__name__, noted.__doc__ = command, command.__name__, command.__doc__
        noted.__annotations__ = command.__annotations__
        return noted

    table = command_line.commands
    with monkeypatch.context() as patch:
        known = lambda words: {name: instead(name, each) for name, each in table(words).items()}
        patch.setattr(command_line, "commands", known)
        patch.setattr(command_line, "info", lambda: called.append("info") or 0)
        assert command_line.main(words) == 0, words
    assert called == [words[0]], words


def test_every_path_exists():
    """Files that are named in code type are there; so is what links lead to."""
    folders = "csrc|vqkernels|python_tests|bench|docs"
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
        for target in re.findall(rf"`((?:{folders})/[\w./-]+)`", text):
            assert (ROOT / target).exists(), f"{page.name}: {target}"
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
            # two pages of the site stand in the root
            beside = page.parent / {"contributing.md": "../CONTRIBUTING.md"}.get(target, target)
            assert target.startswith("http") or beside.exists(), f"{page.name}: {target}"


def test_pages_are_built_in_silence(tmp_path):
    """No warning, and no page that makes a browser fetch anything."""
    pytest.importorskip("mkdocs")
    build = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path)]
    # the theme advertises its successor
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    ran = subprocess.run(build, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert ran.returncode == 0 and not ran.stdout + ran.stderr, ran.stdout + ran.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 15
    fetched = r"<(?:script|img|iframe|source)[^>]*?src=[\"']?(?:https?:)?//|<link[^>]*href=[\"']?(?:https?:)?//[^>]*stylesheet"
    for page in pages:
        assert not re.search(fetched, page.read_text()), page
    for style in tmp_path.rglob("*.css"):
        assert not re.search(r"url\([\"']?(?:https?:)?//|@import", style.read_text()), style


def test_pictures_are_drawn(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    pictures = importlib.import_module("pictures")
    assert pictures.main(["exactness", "memory", "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"exactness.png", "memory.png"}
