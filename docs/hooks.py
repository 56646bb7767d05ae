"""What pages say of the code is read from the code while they are built, so that it cannot go stale.

A page holds a line `<!-- differences: MODULE -->` where the differences of the faces of that module shall stand, and
`<!-- refused: MODULE -->` for the options that they refuse. CONTRIBUTING.md and CHANGELOG.md of the project's root become
pages as they are.
"""

from __future__ import annotations

import ast
import importlib
import re
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
    """A list of the options that the source of a module, or of a package, refuses by `unserved`.

    Args:
        module: such as "vqkernels.compat.diveq".
    """
    path = ROOT / module.replace(".", "/")
    options = set()
    for file in sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "unserved":
                option = node.args[1]
                # a name that only a run knows stands in the docstring of its class
                options |= {option.value} if isinstance(option, ast.Constant) else set()
    return (
        ", ".join(f"`{option}`" for option in sorted(options)) + "." if options else "No option is refused."
    )


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
    # what holds for all of them is said once
    shared = (
        set.intersection(*(set(face.differences) for face in faces.values())) if len(faces) > 1 else set()
    )
    told = dict.fromkeys(text for face in faces.values() for text in face.differences if text in shared)
    parts = [_list("All of them", list(told))] if told else []
    for name, face in faces.items():
        own = [text for text in face.differences if text not in shared]
        if own or not told:
            parts.append(_list(f"`{name}`", own or ["None that we know of."]))
    return "\n\n".join(parts)


def _list(head: str, sentences: list[str]) -> str:
    return "\n".join([f"**{head}**", "", *(f"- {text[:1].upper()}{text[1:]}" for text in sentences)])
