"""Reads a compiled kernel's machine code (SASS): its loop, waits, copies by the copy engine, serialised products.

nvdisasm prints it, one instruction a line, and labels where branches go. Only loops are of interest: what is executed
once does not count beside them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

MATRIX = re.compile(r"\b(HGMMA|QGMMA|IGMMA|UTCHMMA|UTCQMMA|UTCIMMA|HMMA|IMMA|QMMA)\b")
_GROUPED = re.compile(r"\b[HQI]GMMA\b")  # wgmma: of four warps, and not waited for until it is said
_WAIT = re.compile(r"\bWARPGROUP\.DEPBAR\.LE gsb\d, (0x[0-9a-f]+)")
_LABEL = re.compile(r"^(\.L_\w+):")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;")
_TARGET = re.compile(r"\.L_\w+")
_ENDS = re.compile(r"^(BRA|BRX|JMP|JMX|EXIT|RET|KILL)\b(?!.*\b!?UP\d+,)")  # without a predicate nothing follows


@dataclass(frozen=True)
class Code:
    """Facts of a kernel's machine code."""

    matrix: str  # its matrix instruction; "" without one
    loop: int  # instructions of its longest innermost loop; 0 without one
    loop_waits: tuple[
        int, ...
    ]  # of each wait for wgmma in that loop, how many groups it leaves pending; 0: waits for all
    bulk_loads: int  # tiles that the copy engine (TMA) reads
    bulk_stores: int
    loop_reads: int  # instructions of the loop that read global memory into registers (LDG)
    products: int  # wgmma instructions
    waits: int  # for them, in the whole kernel

    def serialised(self, asked_for: int) -> bool:
        """Whether ptxas waits for each product, where the intermediate code asks for that few waits.

        One or two more than were asked for are none of that: it adds them where paths meet.
        """
        return self.waits >= self.products > asked_for


def read(sass: str) -> Code:
    """Facts of what `nvdisasm -c` prints."""
    instructions, successors = _graph(sass)
    loops = _loops(instructions, successors, range(len(instructions)))
    loop = [instructions[i] for i in max(loops, key=len, default=[])]
    matrix = MATRIX.search(sass)
    return Code(
        matrix=matrix[1] if matrix else "",
        loop=len(loop),
        loop_waits=tuple(int(found[1], 16) for line in loop if (found := _WAIT.search(line))),
        bulk_loads=_count(instructions, r"\bUTMALDG\b"),
        bulk_stores=_count(instructions, r"\bUTMASTG\b"),
        loop_reads=_count(loop, r"\bLDG\b"),
        products=_count(instructions, _GROUPED.pattern),
        waits=_count(instructions, _WAIT.pattern),
    )


def _count(instructions: Iterable[str], pattern: str) -> int:
    return sum(1 for line in instructions if re.search(pattern, line))


def _graph(sass: str) -> tuple[list[str], dict[int, list[int]]]:
    """Instructions in order, and of each the places of those that may follow it."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := _INSTRUCTION.match(line):
            instructions.append(found[1])
    last = len(instructions) - 1
    successors = {
        i: [labels[name] for name in _TARGET.findall(text) if labels.get(name, last + 1) <= last]
        + ([] if _ENDS.match(text) or i == last else [i + 1])
        for i, text in enumerate(instructions)
    }
    return instructions, successors


def _loops(
    instructions: Sequence[str], successors: Mapping[int, Sequence[int]], inside: Iterable[int]
) -> list[list[int]]:
    """Loops without one of matrix instructions inside; what spins on a barrier is part of the loop around it."""
    found = []
    for loop in _cycles(successors, {*inside}):
        deeper = _loops(instructions, successors, loop[1:])
        deeper = [one for one in deeper if any(MATRIX.search(instructions[i]) for i in one)]
        found += deeper or [loop]
    return found


def _cycles(successors: Mapping[int, Sequence[int]], inside: set[int]) -> list[list[int]]:
    """Strongly connected parts of the graph (Tarjan), each in ascending order; a branch to itself is the code's end."""
    order: dict[int, int] = {}
    lowest: dict[int, int] = {}
    stack: list[int] = []
    found = []
    for root in sorted(inside):
        if root in order:
            continue
        path = [(root, iter(successors[root]))]
        order[root] = lowest[root] = len(order)
        stack.append(root)
        while path:
            node, following = path[-1]
            for other in following:
                if other not in inside:
                    continue
                if other not in order:
                    order[other] = lowest[other] = len(order)
                    stack.append(other)
                    path.append((other, iter(successors[other])))
                    break
                if other in lowest:  # still on the stack
                    lowest[node] = min(lowest[node], order[other])
            else:
                path.pop()
                if path:
                    lowest[path[-1][0]] = min(lowest[path[-1][0]], lowest[node])
                if lowest[node] == order[node]:
                    at = stack.index(node)
                    part, stack[at:] = sorted(stack[at:]), []
                    for one in part:
                        del lowest[one]
                    if len(part) > 1:
                        found.append(part)
    return found
