"""Tables on standard output."""

from collections.abc import Iterable, Sequence


def print_table(head: Sequence[str], rows: Iterable[Sequence[str]], width: int | None = None) -> None:
    """Prints a table.

    Args:
        head: names of the columns.
        rows: cells of each row, as many as there are columns.
        width: characters of a line; None for those of the terminal.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table(*head)
    for row in rows:
        table.add_row(*row)
    Console(width=width).print(table)
