"""Progress bars on stderr, by bytes and by things."""

import contextlib
import time
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def byte_progress(title: str, num_bytes: int, enabled: bool) -> Iterator[Callable[[int], None]]:
    """Yields the function to call with the bytes just done; it does nothing where the bar is not `enabled`."""
    if not enabled:
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.table import Column

    columns = (
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, max_width=36)),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    # Where it cannot be taken back (a file, a pipe), the bar is left as it ends: one line instead of an empty one.
    with Progress(*columns, console=console, transient=console.is_terminal) as bar:
        task = bar.add_task(title, total=num_bytes)
        yield lambda done: bar.advance(task, done)


@contextlib.contextmanager
def count_progress(title: str, enabled: bool, unit: str | None = None) -> Iterator[Callable[[int, int], None]]:
    """Yields the function to call with (things done, things to do); the bar comes with the first call.

    Args:
        unit: what things are called where the bar is to say how many a second are done, since that call.
    """
    if not enabled:
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = [TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn()]
    columns += [TextColumn("{task.fields[rate]}")] if unit else []
    bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
    task = bar.add_task(title, total=None, rate="")
    begun: list[tuple[int, float]] = []

    def show(done: int, total: int) -> None:
        if not begun:
            begun.append((done, time.perf_counter()))
            bar.start()
        first, start = begun[0]
        speed = (done - first) / max(time.perf_counter() - start, 1e-9)
        bar.update(task, completed=done, total=total, rate=f"{speed:.0f} {unit}/s")

    try:
        yield show
    finally:
        bar.stop()
