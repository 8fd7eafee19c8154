"""Where tables go: the terminal as wide as it is, and a pipe as wide as they need."""

from rich.console import Console

# A pipe has no width of its own, and rich's 80 columns would cut the tables.
PIPED_WIDTH = 132


def table_console() -> Console:
    """Standard output."""
    console = Console()
    return console if console.is_terminal else Console(width=PIPED_WIDTH)
