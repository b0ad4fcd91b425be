"""What the commands that write a page of docs/ share."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write(name: str, page: Callable[[], str]) -> None:
    """The body of a command: writes docs/<name>, or prints the page."""
    parser = argparse.ArgumentParser(description=f"Writes docs/{name}.")
    parser.add_argument("--print", action="store_true", help="print the page instead")
    text = page()
    if parser.parse_args().print:
        print(text, end="")
    else:
        (DOCS / name).write_text(text)
