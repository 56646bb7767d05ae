"""The report of a profiled training step, and two of them side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vqkernels.profiling.attribution import PHASES, Spent

# ops of a quantizer that a table shows
_SHOWN = 10


@dataclass(frozen=True)
class QuantizerTime:
    """One quantizer in a step.

    Attributes:
        path: of the module; empty where the model is one.
        kind: its class.
        forward_ms, backward_ms, optimizer_ms: per step; the last is a commit that follows the optimizer.
        share: of the step.
    """

    path: str
    kind: str
    forward_ms: float
    backward_ms: float
    optimizer_ms: float
    share: float

    @property
    def ms(self) -> float:
        """All of it, per step."""
        return self.forward_ms + self.backward_ms + self.optimizer_ms


@dataclass(frozen=True)
class OpTime:
    """One op inside quantizers, such as vqkernels::nearest_code.

    Attributes:
        op: its name in torch's profiler. calls: per step. ms: per step, of all phases. share: of the step.
    """

    op: str
    calls: float
    ms: float
    share: float


@dataclass(frozen=True)
class StepProfile:
    """What a training step took.

    Attributes:
        title: what was profiled. device: it ran on. steps: of which these are means, or medians.
        forward_ms, backward_ms, optimizer_ms: medians without a profiler.
        profiled_ms: a step as the profiler saw it, whose parts the shares are of; on a GPU, time of kernels.
        quantizers: in the order of the model. ops: inside of them, the longest first.
        peak_bytes: of memory in a step above what there was before; None where nobody knows.
    """

    title: str
    device: str
    steps: int
    forward_ms: float
    backward_ms: float
    optimizer_ms: float
    profiled_ms: float
    quantizers: tuple[QuantizerTime, ...]
    ops: tuple[OpTime, ...]
    peak_bytes: int | None

    @property
    def step_ms(self) -> float:
        """A step without a profiler."""
        return self.forward_ms + self.backward_ms + self.optimizer_ms

    @property
    def share(self) -> float:
        """Of the step that all quantizers take, from 0 to 1."""
        return sum(each.share for each in self.quantizers)

    @property
    def quantizer_ms(self) -> float:
        """What all quantizers take of a step, as the profiler saw it."""
        return sum(each.ms for each in self.quantizers)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON has it."""
        sums = {"step_ms": self.step_ms, "share": self.share, "quantizer_ms": self.quantizer_ms}
        return asdict(self) | sums

    def __str__(self) -> str:
        lines = [
            f"training step on {self.device}, {self.title}: {self.step_ms:.3g} ms (forward {self.forward_ms:.3g}, "
            f"backward {self.backward_ms:.3g}, optimizer {self.optimizer_ms:.3g})",
            f"quantizers take {self.share:.1%} of it (of {self.profiled_ms:.3g} ms as the profiler saw it, as below)"
            + ("" if self.peak_bytes is None else f"; peak memory of a step {self.peak_bytes / 1e6:.3g} MB"),
        ]
        if not self.quantizers:
            lines.append("no quantizer of vqkernels, or of a library that convert knows, is in this model")
            return "\n".join(lines)
        rows = [("quantizer", "class", "forward ms", "backward ms", "commit ms", "of step")]
        rows += [
            (
                each.path or "(the model)",
                each.kind,
                f"{each.forward_ms:.3g}",
                f"{each.backward_ms:.3g}",
                f"{each.optimizer_ms:.3g}",
                f"{each.share:.1%}",
            )
            for each in self.quantizers
        ]
        lines += columns(rows, left=2)
        if not self.ops:
            return "\n".join([*lines, "no quantizer ran in these steps"])
        shown = self.ops[:_SHOWN]
        rows = [("op inside quantizers", "calls", "ms", "of step")]
        rows += [(each.op, f"{each.calls:g}", f"{each.ms:.3g}", f"{each.share:.1%}") for each in shown]
        rest = self.ops[_SHOWN:]
        if rest:
            total, share = sum(each.ms for each in rest), sum(each.share for each in rest)
            calls = sum(each.calls for each in rest)
            rows.append((f"{len(rest)} others", f"{calls:g}", f"{total:.3g}", f"{share:.1%}"))
        return "\n".join([*lines, *columns(rows, left=1)])


@dataclass(frozen=True)
class Comparison:
    """A training step before and after `convert`."""

    before: StepProfile
    after: StepProfile

    @property
    def faster(self) -> float:
        """How many times less the quantizers take afterwards."""
        return self.before.quantizer_ms / max(self.after.quantizer_ms, 1e-9)

    def to_dict(self) -> dict[str, Any]:
        """Both, and how many times less the quantizers take afterwards."""
        return {"before": self.before.to_dict(), "after": self.after.to_dict(), "faster": self.faster}

    def __str__(self) -> str:
        pairs = [
            ("step, ms", "step_ms", 1.0),
            ("forward, ms", "forward_ms", 1.0),
            ("backward, ms", "backward_ms", 1.0),
            ("optimizer, ms", "optimizer_ms", 1.0),
            ("in quantizers, ms (profiled)", "quantizer_ms", 1.0),
            ("in quantizers, % of step", "share", 100.0),
            ("peak memory of a step, MB", "peak_bytes", 1e-6),
        ]
        rows = [("", "before", "after", "ratio")]
        for words, name, scale in pairs:
            old, new = getattr(self.before, name), getattr(self.after, name)
            if old is not None and new is not None:
                ratio = f"{old / new:.2f}x" if new else "-"
                rows.append((words, f"{scale * old:.3g}", f"{scale * new:.3g}", ratio))
        return "\n".join([*columns(rows, left=1), "", str(self.before), "", str(self.after)])


def profile_of(
    title: str,
    *,
    device: str,
    steps: int,
    phases: Mapping[str, float],
    quantizers: Mapping[str, type],
    found: Sequence[Spent],
    peak_bytes: int | None,
) -> StepProfile:
    """Sum up what was spent.

    Args:
        title: of the report. device: it ran on. steps: that were profiled.
        phases: median seconds of each without a profiler.
        quantizers: classes by path.
        found: of all profiled steps.
        peak_bytes: of memory.
    """
    scale = 1e-3 / steps
    whole = scale * sum(each.microseconds for each in found)
    ratio = 1.0 / whole if whole else 0.0
    rows = []
    for path, kind in quantizers.items():
        own = [each for each in found if each.path == path]
        ms = {
            phase: scale * sum(each.microseconds for each in own if each.phase == phase) for phase in PHASES
        }
        rows.append(QuantizerTime(path, kind.__qualname__, *ms.values(), share=ratio * sum(ms.values())))
    by_op: dict[str, list[float]] = {}
    for each in found:
        if each.path is not None:
            total = by_op.setdefault(each.op, [0.0, 0.0])
            total[0] += scale * each.microseconds
            total[1] += each.calls / steps
    ops = [OpTime(op, calls, ms, ratio * ms) for op, (ms, calls) in by_op.items() if ms > 0]
    return StepProfile(
        title,
        device,
        steps,
        *(1e3 * phases[phase] for phase in PHASES),
        profiled_ms=whole,
        quantizers=tuple(rows),
        ops=tuple(sorted(ops, key=lambda each: -each.ms)),
        peak_bytes=peak_bytes,
    )


def columns(rows: Sequence[Sequence[str]], *, left: int) -> list[str]:
    """Lines of a table, its first `left` columns flush left.

    Args:
        rows: of as many cells each.
        left: number of columns.
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  "
        + "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    ]
