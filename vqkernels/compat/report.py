"""What a conversion did, to read and to store."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import nn

from vqkernels.compat.agreement import Check
from vqkernels.compat.verification import Batch, Pair, verify

_COLUMNS = 100
# of a path in a table; a longer one has a line of its own
_PATH = 40


class Row(NamedTuple):
    """One quantizer of the model.

    Attributes:
        paths: every place in which the model holds it; "" is the model itself.
        peer: qualified name of its class.
        face: qualified name of what takes its place; None where it is not known.
        status: "converted", "convertible" (a dry run), or "left" as it was.
        options: what was carried over and is not the peer's default.
        differences: a sentence for each way in which the face behaves otherwise, on purpose.
        reason: why it was left.
    """

    paths: tuple[str, ...]
    peer: str
    face: str | None
    status: str
    options: dict[str, object]
    differences: tuple[str, ...]
    reason: str | None

    @property
    def path(self) -> str:
        """All of its paths."""
        return ", ".join(path or "(the model)" for path in self.paths)


@dataclass(eq=False, repr=False)
class ConversionReport:
    """What `convert` found and did; `print` it.

    Attributes:
        rows: one for each quantizer.
        checks: what a verification found, one for each quantizer that has a face.
    """

    rows: tuple[Row, ...]
    checks: tuple[Check, ...] = ()
    # the model alone, in the table that holds it: a face may take the place of a whole model
    _roots: list[nn.Module] = field(default_factory=list)
    _pairs: Sequence[Pair] = ()

    @property
    def model(self) -> nn.Module:
        """The model; the face, where the model itself was a quantizer."""
        return self._roots[0]

    @property
    def converted(self) -> tuple[Row, ...]:
        """Quantizers that have a face, or would have after a dry run."""
        return tuple(row for row in self.rows if row.status != "left")

    @property
    def left(self) -> tuple[Row, ...]:
        """Quantizers that stay, each with its reason."""
        return tuple(row for row in self.rows if row.status == "left")

    @property
    def verified(self) -> bool | None:
        """Whether every face was called and agreed; None without a verification."""
        return all(check.calls and not check.failures for check in self.checks) if self.checks else None

    def verify(self, batch: Batch) -> ConversionReport:
        """Compare each peer with its face on what one forward in eval mode gives them.

        Before and after the swap, also after training: a peer shares its tensors with its face. Nothing changes.

        Args:
            batch: what the model's forward takes: a tensor, a tuple of arguments or a dict of keywords.

        Returns:
            This report with the checks; failures are in them, and in what it prints.
        """
        self.checks = verify(self._roots, self._pairs, batch)
        return self

    def to_dict(self) -> dict[str, object]:
        """The report in numbers, strings, lists and dicts, as for json."""
        rows = [
            {**row._asdict(), "options": {k: _plain(v) for k, v in row.options.items()}} for row in self.rows
        ]
        return {"rows": rows, "checks": [check._asdict() for check in self.checks], "verified": self.verified}

    def __repr__(self) -> str:
        return f"ConversionReport({len(self.converted)} converted, {len(self.left)} left)"

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        if not self.rows:
            yield "No quantizer of a library that vqkernels knows."
            return
        dry = any(row.status == "convertible" for row in self.rows)
        done, kept = ("to convert (a dry run)" if dry else "converted"), "left as they are"
        yield f"Quantizers: {len(self.converted)} {done}, {len(self.left)} {kept}."
        yield ""
        yield from _table(
            ("where", "class", "library", "status"),
            [
                (row.path, row.peer.rpartition(".")[2], row.peer.partition(".")[0], row.status)
                for row in self.rows
            ],
            [_detail(row) for row in self.rows],
        )
        for names, sentences in _by_class(self.converted):
            yield ""
            yield from _wrapped(f"{', '.join(names)}: what vqkernels does otherwise, on purpose:", 0)
            for sentence in sentences:
                yield from _wrapped(f"- {sentence}", 2)
        if self.checks:
            yield ""
            yield from _verification(self.checks)


def _by_class(rows: Sequence[Row]) -> list[tuple[tuple[str, ...], list[str]]]:
    """Differences under the classes that have them: what several share is said once."""
    classes: dict[str, dict[str, None]] = {}
    for row in rows:
        for sentence in row.differences:
            classes.setdefault(sentence, {})[row.peer.rpartition(".")[2]] = None
    groups: dict[tuple[str, ...], list[str]] = {}
    for sentence, names in classes.items():
        groups.setdefault(tuple(names), []).append(sentence)
    return list(groups.items())


def _detail(row: Row) -> tuple[str, ...]:
    options = ", ".join(f"{key}={_plain(value)!r}" for key, value in row.options.items())
    return tuple(line for line in (options, row.reason) if line)


def _verification(checks: Sequence[Check]) -> Iterator[str]:
    failed = sum(bool(check.failures) for check in checks)
    missed = sum(not check.calls for check in checks)
    words = [f"{failed} failed" if failed else "", f"{missed} not called by this forward" if missed else ""]
    yield f"Verified: {'; '.join(filter(None, words)) or 'peers and faces agree'}."
    yield from _wrapped("Rows with other indices are judged by distances in float64.", 0)
    yield ""
    heads = ("where", "rows", "other", "peer errs", "ties", "ours errs", "|difference|", "bound")
    cells = []
    for one in checks:
        counts = (one.rows, one.differing, one.peer_farther, one.ties, one.ours_farther)
        sizes = (f"{one.output_difference:.2e}", f"{one.output_bound:.2e}")
        cells.append(
            (one.path, *(map(str, counts)), *sizes) if one.calls else (one.path, "not called", *[""] * 6)
        )
    yield from _table(heads, cells, [(*check.failures, *check.notes) for check in checks])


def _table(
    heads: Sequence[str], rows: list[tuple[str, ...]], details: list[tuple[str, ...]]
) -> Iterator[str]:
    """Columns as wide as they need to be; what belongs to a row stands below it, indented."""
    short = [("" if len(row[0]) > _PATH else row[0], *row[1:]) for row in rows]
    widths = [max(map(len, column)) for column in zip(heads, *short)]
    # numbers to the right, below their heads
    right = [
        bool(rows) and all(row[i][:1].isdigit() or not row[i] for row in rows) for i in range(len(heads))
    ]

    def line(cells: Sequence[str]) -> str:
        sides = zip(cells, widths, right)
        return "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in sides).rstrip()

    yield line(heads)
    yield "-" * (sum(widths) + 2 * (len(widths) - 1))
    for row, cells, below in zip(rows, short, details):
        if not cells[0]:
            yield from _wrapped(row[0], 0)
        yield line(cells)
        for text in below:
            yield from _wrapped(text, 4)


def _wrapped(text: str, indent: int) -> Iterator[str]:
    hang = " " * indent
    first = "" if text.startswith("- ") else hang
    yield from textwrap.wrap(text, _COLUMNS, initial_indent=first, subsequent_indent=hang)


def _plain(value: object) -> object:
    """What json knows, or words."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (tuple, list)):
        return [_plain(one) for one in value]
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    return getattr(value, "__qualname__", None) or type(value).__qualname__
