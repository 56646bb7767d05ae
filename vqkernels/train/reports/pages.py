"""A report as one self-contained HTML page, or as Markdown with a folder of pictures."""

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from vqkernels.checks import refuse
from vqkernels.train.checkpoints.files import open_folder, replace_file
from vqkernels.train.config import RunError

SUFFIXES = (".html", ".md")

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1d2429; background: #fff; max-width: 1080px;
       margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; }
h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #d8dee3; padding-bottom: .2rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .8rem .28rem 0; text-align: right; border-bottom: 1px solid #e7ebee; white-space: nowrap; }
th { font-weight: 600; color: #4a5660; }
th:first-child, td:first-child { text-align: left; }
.groups { display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); gap: 0 2rem; }
.groups table { width: 100%; table-layout: fixed; }
.groups td { white-space: normal; overflow-wrap: anywhere; padding-right: .4rem; }
figure { margin: 1rem 0 1.6rem; }
figure img { max-width: 100%; height: auto; }
figcaption, .note { color: #4a5660; font-size: .92rem; }
"""


@dataclass(frozen=True)
class Table:
    """Cells of text.

    Attributes:
        title: above it, empty for none.
        headings: of the columns, empty for none.
        rows: cells, as many as headings where there are any.
        note: below it.
    """

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True)
class Illustration:
    """A picture of a report.

    Attributes:
        title: above it; also the name of its file.
        caption: below it, one or two sentences.
        png: the file.
    """

    title: str
    caption: str
    png: bytes


@dataclass(frozen=True)
class Report:
    """What a report says, before it is a page.

    Attributes:
        title: of the page.
        lead: one paragraph that says what was measured.
        tables: of numbers.
        illustrations: in order.
        configuration: one table of names and values for each group of options.
        surroundings: versions and machine.
    """

    title: str
    lead: str
    tables: Sequence[Table]
    illustrations: Sequence[Illustration]
    configuration: Sequence[Table]
    surroundings: Table


def check_report_path(path: Path) -> None:
    """Refuse a name that no report can have, and make its folder.

    Args:
        path: of the report.

    Raises:
        RunError: if it does not end in .html or .md, or its folder cannot be written.
    """
    if path.suffix.lower() not in SUFFIXES or path.is_dir():
        fix = "Pass --report FILE.html or FILE.md"
        refuse(RunError, "evaluate", "report", "name a .html or .md file", path, fix)
    open_folder(path.parent, "report")


def write_report(path: Path, report: Report) -> None:
    """Write a report: .html holds its pictures; those of .md lie in a folder beside it, written before the page.

    Args:
        path: ends in .html or .md.
        report: to write.

    Raises:
        RunError: if the path has another ending, or cannot be written.
    """
    check_report_path(path)
    if path.suffix.lower() == ".html":
        replace_file(path, to_html(report).encode())
        return
    folder = path.parent / f"{path.stem}_pictures"
    if report.illustrations:
        open_folder(folder, "report")
    for picture in report.illustrations:
        replace_file(folder / _file_name(picture), picture.png)
    replace_file(path, to_markdown(report, folder.name).encode())


def to_html(report: Report) -> str:
    """Return a page that needs nothing but itself.

    Args:
        report: to render.
    """
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(report.title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{escape(report.title)}</h1><p class='note'>{escape(report.lead)}</p>",
    ]
    parts += [_html_table(table, "h2") for table in report.tables]
    for picture in report.illustrations:
        data = base64.b64encode(picture.png).decode()
        parts += [
            f"<h2>{escape(picture.title)}</h2>",
            f'<figure><img alt="{escape(picture.title)}" src="data:image/png;base64,{data}">',
            f"<figcaption>{escape(picture.caption)}</figcaption></figure>",
        ]
    parts.append('<h2>Configuration</h2><div class="groups">')
    parts += [f"<div>{_html_table(table, 'h3')}</div>" for table in report.configuration]
    parts += ["</div>", _html_table(report.surroundings, "h2"), "</body></html>"]
    return "\n".join(parts) + "\n"


def to_markdown(report: Report, folder: str) -> str:
    """Return a page that shows pictures of a folder beside it.

    Args:
        report: to render.
        folder: name of the folder.
    """
    parts = [f"# {_plain(report.title)}", _plain(report.lead)]
    for table in report.tables:
        parts += _markdown_table(table, "##")
    for picture in report.illustrations:
        # a blank in the name of a folder would end the link
        target = f"<{folder}/{_file_name(picture)}>"
        parts += [
            f"## {_plain(picture.title)}",
            f"![{_plain(picture.title)}]({target})",
            _plain(picture.caption),
        ]
    parts.append("## Configuration")
    for table in (*report.configuration, report.surroundings):
        parts += _markdown_table(table, "##" if table is report.surroundings else "###")
    return "\n\n".join(parts) + "\n"


def _html_table(table: Table, level: str) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in table.headings)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows
    )
    title = f"<{level}>{escape(table.title)}</{level}>" if table.title else ""
    head = f"<thead><tr>{head}</tr></thead>" if head else ""
    note = f"<p class='note'>{escape(table.note)}</p>" if table.note else ""
    return f'{title}<div class="scroll"><table>{head}<tbody>{body}</tbody></table></div>{note}'


def _markdown_table(table: Table, level: str) -> list[str]:
    columns = max(map(len, (table.headings, *table.rows)), default=0)
    headings = table.headings or [""] * columns
    alignment = [":---", *["---:"] * (columns - 1)]
    lines = ["| " + " | ".join(map(_plain, headings)) + " |", "| " + " | ".join(alignment) + " |"]
    lines += ["| " + " | ".join(map(_plain, row)) + " |" for row in table.rows]
    title = [f"{level} {_plain(table.title)}"] if table.title else []
    return [*title, "\n".join(lines), *([_plain(table.note)] if table.note else [])]


def _plain(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    return re.sub(r"([\\`*_|<>\[\]#$&~])", r"\\\1", " ".join(text.split()))


def _file_name(picture: Illustration) -> str:
    return re.sub(r"[^a-z0-9]+", "_", picture.title.lower()).strip("_") + ".png"
