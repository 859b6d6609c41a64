"""Where a long command is: one line that is kept up to date on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import threading
import time
import unicodedata
from types import TracebackType
from typing import Self, TextIO

from sparse_onnx.progress import format_duration, is_lasting, is_step

__all__ = ["LiveLine", "display_width", "fit", "is_live"]

_TICK, _STEP, _SILENCE, _LONGEST_SILENCE = 0.5, 1.0, 2.0, 10.0  # seconds
_CLEAR = "\r\x1b[K"
_FALLBACK_WIDTH = 80
_ELLIPSIS = "…"


def is_live(stream: TextIO) -> bool:
    """True if ``stream`` is a terminal on which a line can be replaced."""
    return stream.isatty() and os.environ.get("TERM", "dumb") not in ("", "dumb")


def display_width(text: str) -> int:
    """The columns that ``text`` takes on a terminal: two for wide characters, none for combining ones."""
    return sum(
        0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1
        for char in text
    )


def printable(text: str) -> str:
    """``text`` without control characters, which names out of a model file may hold."""
    return "".join(" " if unicodedata.category(char)[0] == "C" else char for char in text)


def fit(text: str, width: int) -> str:
    """``text`` in at most ``width`` columns; what is too long loses its middle, since the end says the time left."""
    if display_width(text) <= width:
        return text
    if width < 1:
        return ""
    head = _start(text, (width - 1) // 2)
    tail = _start(text[::-1], width - 1 - display_width(head))[::-1]
    return f"{head}{_ELLIPSIS}{tail}"


def _start(text: str, width: int) -> str:
    """As much of the start of ``text`` as takes ``width`` columns."""
    used = 0
    for index, char in enumerate(text):
        used += display_width(char)
        if used > width:
            return text[:index]
    return text


class LiveLine:
    """Shows lines of progress with the time since the start, from the ``with`` block's beginning to its end.

    On a terminal the newest line is redrawn in place, twice a second and fitted to the terminal's width; it is gone at
    the end, also after an error. Elsewhere every stage has its line, and steps have one a second. If nothing is said
    for two seconds, the last line is said again with how long it has been going on, then ever more rarely, up to every
    ten seconds. Lasting lines (:func:`sparse_onnx.progress.is_lasting`) stay in both.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._live = is_live(self._stream)
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._ticker = threading.Thread(target=self._tick, name="progress", daemon=True)
        self._begin = time.monotonic()
        self._line, self._since, self._shown, self._pause = "", self._begin, self._begin, _SILENCE
        self._pending = False

    def __enter__(self) -> Self:
        self._ticker.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._ticker.join()
        if self._live:
            self._write(_CLEAR)
        elif self._pending:
            self._print(time.monotonic())

    def __call__(self, line: str) -> None:
        """Say where the work is."""
        line = printable(line)
        now = time.monotonic()
        with self._lock:
            if is_lasting(line):
                self._write(f"{_CLEAR}{line}\n" if self._live else f"{line}\n")
            else:
                self._line, self._since, self._pause = line, now, _SILENCE
                self._pending = is_step(line) and now - self._shown < _STEP
                if not self._pending and not self._live:
                    self._print(now)
            if self._live:
                self._draw()

    def _tick(self) -> None:
        while not self._ended.wait(_TICK):
            self._remind()

    def _remind(self) -> None:
        """Show where the work is although nothing was said."""
        now = time.monotonic()
        with self._lock:
            silent = now - self._shown
            if self._live:
                self._draw()
            elif self._pending and silent >= _STEP:
                self._print(now)
            elif self._line and silent >= self._pause:
                self._pause = min(2 * self._pause, _LONGEST_SILENCE)
                self._print(now)

    def _print(self, now: float) -> None:
        self._shown, self._pending = now, False
        self._write(f"{self._text()}\n")

    def _draw(self) -> None:
        self._write(_CLEAR + fit(self._text(), self._width() - 1))  # in the last column some terminals wrap

    def _text(self) -> str:
        return f"{self._clock()} {self._line}{self._so_far()}"

    def _clock(self) -> str:
        minutes, seconds = divmod(int(time.monotonic() - self._begin), 60)
        return f"[{minutes}:{seconds:02d}]"

    def _so_far(self) -> str:
        spent = time.monotonic() - self._since
        return f" ({format_duration(spent)} so far)" if spent >= _SILENCE else ""

    def _width(self) -> int:
        try:
            return os.get_terminal_size(self._stream.fileno()).columns or _FALLBACK_WIDTH
        except (OSError, ValueError):
            return _FALLBACK_WIDTH

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):  # the terminal is gone: no reason to lose the work
            self._ended.set()
