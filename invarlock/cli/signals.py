"""SIGTERM and SIGHUP end a command as Ctrl-C does: what is not whole is cleaned up, and a line says what is kept."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from invarlock.core.errors import ExitCode

if TYPE_CHECKING:
    from invarlock.checkpoints.output_folder import OutputFolder

STATUS = {
    signal.SIGINT: ExitCode.INTERRUPTED,
    signal.SIGTERM: ExitCode.TERMINATED,
    signal.SIGHUP: ExitCode.HUNG_UP,
}
GRACE = 5.0
"""Seconds that a command has to end by itself. Containers are killed 10 s after SIGTERM, jobs of Slurm after 30."""

_output: OutputFolder | None = None


class Interrupted(KeyboardInterrupt):
    """One of these signals came."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = signal.Signals(number)


@contextmanager
def taken() -> Iterator[None]:
    """In the block, each of these signals raises ``Interrupted``, unless it is ignored or handled by somebody else.

    Later ones are ignored, so that nothing interrupts the cleaning up. A command that does not end then, because it is
    in a long call of a library or waits for other processes, is ended.
    """
    global _output
    _output = None
    before = {number: signal.getsignal(number) for number in STATUS}
    ours = [number for number, handler in before.items() if handler in (signal.SIG_DFL, signal.default_int_handler)]
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    ended = threading.Event()
    threading.Thread(target=_end_at_last, args=(reader, ended, ours), daemon=True).start()
    # A thread learns of a signal even while the main one is in a call that is not Python's.
    woken = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in ours:
        signal.signal(number, _interrupt)
    try:
        yield
    finally:
        for number in _taken():
            signal.signal(number, before[number])
        signal.set_wakeup_fd(woken)
        ended.set()
        os.close(writer)


def watch(output: OutputFolder) -> None:
    """Register the folder that the command writes to, to be reported and cleaned up when it is interrupted."""
    global _output
    _output = output


def told(interrupt: KeyboardInterrupt) -> str:
    """A line on what ended the command, and what is kept."""
    by = f" by {interrupt.number.name}" if isinstance(interrupt, Interrupted) else ""
    return f"interrupted{by}" + (f"; {_output.kept}" if _output else "")


def status(interrupt: KeyboardInterrupt) -> ExitCode:
    return STATUS[interrupt.number] if isinstance(interrupt, Interrupted) else ExitCode.INTERRUPTED


def _interrupt(number: int, frame: object) -> None:
    for other in _taken():
        signal.signal(other, signal.SIG_IGN)
    raise Interrupted(number)


def _end_at_last(reader: int, ended: threading.Event, numbers: list[signal.Signals]) -> None:
    for number in iter(lambda: os.read(reader, 1), b""):
        if number[0] in numbers and not ended.wait(GRACE):
            _end(Interrupted(number[0]))
    os.close(reader)


def _end(interrupt: Interrupted) -> None:
    if _output:
        with suppress(OSError):
            _output.release()
    with suppress(OSError):
        os.write(2, f"invarlock: error: {told(interrupt)}\n".encode())
    os._exit(status(interrupt))


_mask: set[signal.Signals | int] = set()


def _before_fork() -> None:
    """Hold back signals for a child until it has forgotten the command, lest they be taken for the command's."""
    global _mask
    _mask = signal.pthread_sigmask(signal.SIG_BLOCK, _taken())


def _after_fork() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _mask)


def _in_child() -> None:
    """A child is no command: signals end it as they end others."""
    if taken := _taken():
        signal.set_wakeup_fd(-1)
    for number in taken:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    _after_fork()


def _taken() -> list[signal.Signals]:
    return [number for number in STATUS if signal.getsignal(number) is _interrupt]


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_in_child)
