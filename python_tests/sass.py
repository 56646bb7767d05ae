"""What a loop of machine code costs: its instructions by pipe, read from a disassembly."""

from __future__ import annotations

import collections
import re
from dataclasses import dataclass

# per multiprocessor and clock: 64 lanes of ALU (compare, min, max, select, logic, integer add), 128 of FMA
ALU = frozenset(
    [
        "FMNMX",
        "FMNMX3",
        "FSETP",
        "FSEL",
        "FSET",
        "SEL",
        "LOP3",
        "LOP",
        "ISETP",
        "VIMNMX",
        "VIMNMX3",
        "IMNMX",
        "PLOP3",
        "IADD3",
        "IADD",
        "LEA",
        "SHF",
        "SHL",
        "SHR",
        "PRMT",
        "MOV",
        "FCHK",
        "P2R",
        "R2P",
        "BMSK",
        "SGXT",
        "VABSDIFF",
        "POPC",
        "FLO",
        "BREV",
        "IABS",
        "VIADDMNMX",
    ]
)
FMA = frozenset(["FADD", "FFMA", "FMUL", "IMAD", "HFMA2", "HADD2", "HMUL2", "FADD2", "FFMA2", "FMUL2"])
MATRIX = frozenset(["HGMMA", "HMMA", "UTCHMMA", "QGMMA"])

_LABEL = re.compile(r"\s*(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(.*?);")
_BRANCH = re.compile(r"BRA[^`]*`\((\.L_x_\d+)\)")


@dataclass(frozen=True)
class Loop:
    """Instructions of one pass through a loop, by opcode."""

    counts: collections.Counter[str]
    matrix: int

    def total(self, *names: str) -> int:
        """How often the opcodes `names` occur."""
        return sum(self.counts[name] for name in names)

    @property
    def alu(self) -> int:
        return self.total(*ALU)

    @property
    def fma(self) -> int:
        return self.total(*FMA)

    @property
    def issued(self) -> int:
        return sum(self.counts.values())


def opcode(instruction: str) -> str:
    """The name of an instruction without predicate and suffixes."""
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0].split(".")[0]


def instructions(code: str) -> tuple[list[str], dict[str, int]]:
    """The instructions of a disassembly by `nvdisasm -c`, and where its labels stand."""
    found: list[str] = []
    labels: dict[str, int] = {}
    for line in code.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(found)
        elif instruction := _INSTRUCTION.search(line):
            found.append(instruction[1].strip())
    return found, labels


def loops(code: str) -> list[Loop]:
    """Every innermost natural loop with matrix instructions, the one with most of them first."""
    found, labels = instructions(code)
    blocks = _blocks(found, labels)
    bodies = _natural_loops(found, labels, blocks)
    result = []
    for body in bodies:
        counts = collections.Counter(opcode(each) for begin, end in body for each in found[begin:end])
        matrix = sum(counts[name] for name in MATRIX)
        inner = any(
            other < body and any(opcode(each) in MATRIX for begin, end in other for each in found[begin:end])
            for other in bodies
        )
        if matrix and not inner:
            result.append(Loop(counts, matrix))
    return sorted(result, key=lambda loop: -loop.matrix)


def main_loop(code: str) -> Loop:
    """The loop with most matrix instructions."""
    found = loops(code)
    if not found:
        raise ValueError("main_loop: the code must have a loop with matrix instructions; got none.")
    return found[0]


def _blocks(found: list[str], labels: dict[str, int]) -> list[tuple[int, int]]:
    starts = {0, *labels.values()}
    starts |= {at + 1 for at, each in enumerate(found) if opcode(each) in ("BRA", "EXIT", "RET")}
    order = sorted(at for at in starts if at < len(found))
    return list(zip(order, [*order[1:], len(found)], strict=True))


def _natural_loops(
    found: list[str], labels: dict[str, int], blocks: list[tuple[int, int]]
) -> list[frozenset[tuple[int, int]]]:
    # waits that are tried again stand out of line and branch back, so the order of the text says nothing
    at_start = {begin: number for number, (begin, _) in enumerate(blocks)}
    following: list[set[int]] = []
    for number, (_, end) in enumerate(blocks):
        last = found[end - 1]
        branch = _BRANCH.search(last)
        nexts = (
            {at_start[labels[branch[1]]]}
            if branch and labels.get(branch[1], len(found)) < len(found)
            else set()
        )
        # a predicate stands before the branch or, uniform, behind its name
        conditional = last.startswith("@") or re.search(r"\bU?P\d", last.split("`")[0])
        if (opcode(last) not in ("BRA", "EXIT", "RET") or conditional) and number + 1 < len(blocks):
            nexts.add(number + 1)
        following.append(nexts)
    before: list[set[int]] = [set() for _ in blocks]
    for number, nexts in enumerate(following):
        for each in nexts:
            before[each].add(number)
    everything = set(range(len(blocks)))
    dominators = [everything] * len(blocks)
    dominators[0] = {0}
    changed = True
    while changed:
        changed = False
        for number in range(1, len(blocks)):
            common = (
                set.intersection(*(dominators[each] for each in before[number])) if before[number] else set()
            )
            if (new := common | {number}) != dominators[number]:
                dominators[number], changed = new, True
    bodies: dict[int, set[int]] = {}
    for number, nexts in enumerate(following):
        for head in nexts & dominators[number]:
            body, left = bodies.setdefault(head, {head}), [number]
            while left:
                if (block := left.pop()) not in body:
                    body.add(block)
                    left += before[block]
    return [frozenset(blocks[each] for each in body) for body in bodies.values()]
