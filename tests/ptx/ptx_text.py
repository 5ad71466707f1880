"""Reads a file of PTX: its kernels, and their instructions one by one."""

from __future__ import annotations

import re
from dataclasses import dataclass, field


class Untranslatable(Exception):
    """An instruction that this translator does not know."""


@dataclass
class Kernel:
    """One .entry: its name, parameters, and what stands between its braces."""

    name: str
    parameters: list[str]
    body: list[str]
    lines: int = 0


@dataclass
class Module:
    """A file of PTX."""

    files: dict[int, str] = field(default_factory=dict)
    shared: dict[str, tuple[int, int]] = field(
        default_factory=dict
    )  # name: bytes (0: dynamic), alignment
    kernels: list[Kernel] = field(default_factory=list)


def read(text: str) -> Module:
    """The kernels of a file, and the shared memory that they name."""
    module = Module()
    for number, name in re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]+)"', text, re.MULTILINE):
        module.files[int(number)] = name
    for align, name, size in re.findall(
        r"\.shared\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d*)\]", text
    ):
        module.shared[name] = (int(size or 0), int(align))
    entry = re.compile(
        r"\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{]*)\{\n(.*?)^\}", re.DOTALL | re.MULTILINE
    )
    for name, parameters, _, body in entry.findall(text):
        names = re.findall(r"([\w$]+)(?:\[\d+\])?\s*(?:,|$)", parameters.strip())
        module.kernels.append(Kernel(name, names, body.split("\n")))
    if len(module.kernels) != len(re.findall(r"\.entry\b", text)):
        raise Untranslatable("a kernel that the translator did not find the end of")
    return module


def statements(body: list[str]) -> list[str]:
    """One instruction, label, brace or directive each, without comments."""
    found: list[str] = []
    pending = ""
    for raw in body:
        line = raw.split("//")[0].strip()
        if not pending and re.match(r"\.(loc|pragma)\s", line):
            found.append(line.rstrip(";"))
            continue
        pending = f"{pending} {line}".strip()
        while pending:
            if pending[0] == "{" or pending[0] == "}":
                found.append(pending[0])
                pending = pending[1:].strip()
            elif label := re.match(r"([$\w]+):", pending):
                found.append(label.group())
                pending = pending[label.end() :].strip()
            elif ";" in pending:
                first, pending = pending.split(";", 1)
                found.append(first.strip())
                pending = pending.strip()
            else:
                break
    if pending:
        raise Untranslatable(f"no end of: {pending}")
    return found


def operands(text: str) -> list[str]:
    """Split at commas that are not inside braces or brackets."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "{[") - (c in "}]")
        if c == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    parts.append(text[start:].strip())
    return [p for p in parts if p]
