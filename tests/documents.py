"""The documents of the repository, and the code that is written in them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the line its text starts at."""

    path: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.path.name}:{self.line}"


def find_blocks(path: Path) -> list[Block]:
    document = path.read_text(encoding="utf-8")
    return [
        Block(path, document.count("\n", 0, match.start(2)) + 1, match[1], match[2])
        for match in FENCE.finditer(document)
    ]
