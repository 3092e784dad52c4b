"""A text that a tiny model can learn something from."""

from pathlib import Path


def write_squares(path: Path, lines: int) -> str:
    """Write that many lines of squares and return the path as a command takes it."""
    path.write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(lines)))
    return str(path)
