"""What the parts of the demo print through."""

from rich.console import Console

console = Console(highlight=False, soft_wrap=True)


def step(title: str) -> None:
    """A heading."""
    console.print(f"\n[bold cyan]# {title}[/]")
