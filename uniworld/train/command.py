"""Runs a command of this package as a process of its own, which is asked to stop when we are."""

import signal
import subprocess
import sys
from typing import Any

from uniworld.train.signals import EXIT_STOPPED, STOP_SIGNALS, StopSignals

GRACE_S = 300  # for a command to save after its time is up


def run_command(*arguments: str, seconds: float | None = None, outer: StopSignals | None = None) -> int:
    """`uniworld ARGUMENTS`, which gets the signals that ask us to stop, and SIGTERM after `seconds`.

    Args:
        outer: what caught signals until now; one that came just before is handed on too.

    Returns: its exit code; 143 where it was asked to stop, whether it had something to save yet or not.
    """
    process, received = None, []

    def forward(number: int, _: Any = None) -> None:
        received.append(number)
        if process is not None:
            process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in STOP_SIGNALS}
    if outer is not None and outer.received:
        received.append(signal.SIGTERM)
    try:
        process = subprocess.Popen([sys.executable, "-m", "uniworld.cli", *arguments])
        for number in received:
            process.send_signal(number)
        code = _wait(process, seconds, forward)
        return EXIT_STOPPED if received and code else code
    except BaseException:
        if process is not None:
            process.terminate()
            process.wait()
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(process: subprocess.Popen, seconds: float | None, forward: Any) -> int:
    """The exit code of a process that has so much time, and then GRACE_S to save before it is killed."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        forward(signal.SIGTERM)
    try:
        return process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
