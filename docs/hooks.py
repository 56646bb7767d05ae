"""What pages say of the code is read from the code while they are built, so that it cannot go stale.

A page holds a line `<!-- differences: MODULE -->` where the differences of the faces of that module shall stand, and
`<!-- refused: MODULE -->` for the options that they refuse. CONTRIBUTING.md and CHANGELOG.md of the project's root become
pages as they are.
"""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
ROOT_PAGES = ("CONTRIBUTING.md", "CHANGELOG.md")
MARK = re.compile(r"<!-- (differences|refused): ([\w.]+) -->")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that stand in the root."""
    for name in ROOT_PAGES:
        text = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, name.lower(), content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Write differences and refused options in the place of their marks."""
    write = {"differences": differences, "refused": refused}
    return MARK.sub(lambda found: write[found[1]](found[2]), markdown)


def refused(module: str) -> str:
    """A list of the options that the source of a module, or of a package, refuses by `unserved`, for each face.

    Args:
        module: such as "vqkernels.compat.diveq".
    """
    path = ROOT / module.replace(".", "/")
    found: dict[str, set[str]] = {}
    for file in sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        constants = {
            target.id: node.value.value
            for node in tree.body
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for part in tree.body:
            # of a function that several faces share, the name that it passes
            holder = part.name if isinstance(part, ast.ClassDef) else ""
            for face, option in _unserved(part, constants):
                found.setdefault(face or holder, set()).add(option)
    lines = [
        "- " + (f"`{face}`: " if face else "") + ", ".join(f"`{option}`" for option in sorted(options))
        for face, options in sorted(found.items())
    ]
    return "\n".join(lines) or "No option is refused."


def _unserved(part: ast.AST, constants: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """(face, option) of every call of `unserved`; options that only a run knows stand in docstrings."""
    for node in ast.walk(part):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "unserved":
            face, option = node.args[:2]
            known = (
                face.value if isinstance(face, ast.Constant) else constants.get(getattr(face, "id", ""), "")
            )
            if isinstance(option, ast.Constant):
                yield str(known), str(option.value)


def differences(module: str) -> str:
    """A list for each face of a module: what it does otherwise than its peer, on purpose.

    Args:
        module: such as "vqkernels.compat.diveq".

    Raises:
        ValueError: no face is there.
    """
    from vqkernels.compat.face import Face

    names = vars(importlib.import_module(module))
    faces = {
        name: value for name, value in names.items() if isinstance(value, type) and issubclass(value, Face)
    }
    faces.pop("Face", None)
    if not faces:
        raise ValueError(f"hooks: {module} must export a face; got none. Name its module in the mark.")
    said_by: dict[str, list[str]] = {}
    for name, face in faces.items():
        for sentence in face.differences:
            said_by.setdefault(sentence, []).append(name)
    # what several faces say is said once, under all their names
    groups: dict[tuple[str, ...], list[str]] = {}
    for sentence, names_of_it in said_by.items():
        groups.setdefault(tuple(names_of_it), []).append(sentence)
    parts = []
    for heads, sentences in sorted(groups.items(), key=lambda group: -len(group[0])):
        head = "All of them" if len(heads) == len(faces) > 1 else ", ".join(f"`{name}`" for name in heads)
        parts.append("\n".join([f"**{head}**", "", *(f"- {each}" for each in sentences)]))
    return "\n\n".join(parts) or "Nothing that we know of."
