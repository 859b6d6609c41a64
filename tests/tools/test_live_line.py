"""Progress as the user sees it: one line on a terminal, which fits; plain lines elsewhere."""

import contextlib
import fcntl
import io
import json
import os
import pty
import struct
import sys
import termios
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_onnx.tools import live_line
from sparse_onnx.tools.console import progress, show, table
from sparse_onnx.tools.live_line import LiveLine, display_width, fit


@pytest.mark.parametrize(
    ("text", "width"), [("abc", 3), ("", 0), ("e\u0301", 1), ("日本", 4), ("ｗ", 2), ("→…", 2)]
)
def test_columns_of_a_text(text, width):
    assert display_width(text) == width


@pytest.mark.parametrize(
    ("text", "width", "expected"),
    [
        ("abcdef", 6, "abcdef"),
        ("abcdefgh (3 s left)", 12, "abcde… left)"),
        ("abc", 1, "…"),
        ("abc", 0, ""),
        ("日本語です", 6, "日…す"),
    ],
)
def test_what_is_too_long_loses_its_middle(text, width, expected):
    assert fit(text, width) == expected


@given(st.text(), st.integers(0, 40))
def test_every_text_fits(text, width):
    assert display_width(fit(text, width)) <= width


@pytest.fixture
def clock(monkeypatch):
    """The seconds on the clock, which stands still unless it is set."""
    now = [100.0]
    monkeypatch.setattr(live_line.time, "monotonic", lambda: now[0])
    return now


def test_plain_lines_name_every_stage_and_one_step_a_second(clock):
    stream = io.StringIO()
    line = LiveLine(stream)
    for seconds, text in [
        (0.0, "load"), (0.1, "prune"), (0.2, "prune: 1/9"), (0.4, "prune: 2/9"), (1.2, "prune: 3/9"),
        (1.3, "note: kept"), (1.4, "prune: 4/9"), (61.5, "prune: 5/9"), (61.6, "verify"),
    ]:  # fmt: skip
        clock[0] = 100 + seconds
        line(text)
    assert stream.getvalue().splitlines() == [
        "[0:00] load", "[0:00] prune", "[0:01] prune: 3/9", "note: kept", "[1:01] prune: 5/9", "[1:01] verify",
    ]  # fmt: skip


def test_a_long_silence_is_broken_ever_more_rarely(clock):
    stream = io.StringIO()
    line = LiveLine(stream)
    line("export")
    for second in range(1, 40):
        clock[0] = 100 + second
        line._remind()
    assert stream.getvalue().splitlines() == [
        "[0:00] export",
        *(f"[0:{at:02d}] export ({at} s so far)" for at in (2, 6, 14, 24, 34)),
    ]


def test_a_step_that_came_too_quickly_is_shown_a_little_later(clock):
    stream = io.StringIO()
    line = LiveLine(stream)
    line("prune")
    line("prune: 1/2")
    clock[0] += 0.5
    line._remind()
    assert stream.getvalue() == "[0:00] prune\n"
    clock[0] += 0.5
    line._remind()
    assert stream.getvalue() == "[0:00] prune\n[0:01] prune: 1/2\n"


def test_the_last_step_is_shown_at_the_end():
    stream = io.StringIO()
    with LiveLine(stream) as line:
        line("prune")
        line("prune: 2/2")
    assert stream.getvalue().splitlines() == ["[0:00] prune", "[0:00] prune: 2/2"]


def test_names_from_a_model_cannot_control_the_terminal():
    stream = io.StringIO()
    with LiveLine(stream) as line:
        line("timing \x1b[2J\x07\r\nfc1\u202e")
    assert [char for char in stream.getvalue() if unicodedata.category(char)[0] == "C"] == ["\n"]


class Terminal:
    """A pseudo terminal of a given width; ``text()`` is what was written to it."""

    def __init__(self, columns):
        self.master, slave = pty.openpty()
        self.stream = os.fdopen(slave, "w", encoding="utf-8")
        self.resize(columns)

    def resize(self, columns):
        fcntl.ioctl(self.stream.fileno(), termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    def text(self):
        os.set_blocking(self.master, False)
        parts = []
        with contextlib.suppress(BlockingIOError):
            while part := os.read(self.master, 1 << 16):
                parts.append(part)
        return b"".join(parts).decode()

    def frames(self):
        """What stood on the line, one redrawing after the other."""
        return self.text().split("\r\x1b[K")[1:]

    def close(self):
        for close in (self.stream.close, lambda: os.close(self.master)):
            with contextlib.suppress(OSError):  # whatever a test has left
                close()


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    found = Terminal(40)
    yield found
    found.close()


def test_line_on_a_terminal_is_replaced_fits_and_goes_away(terminal):
    with LiveLine(terminal.stream) as line:
        line("decide: timing 3/72 encoder.layer.0.attention.self.query.weight (12 s left)")
        line("decide: 日本語の名前の層 4/72 とても長い名前のテンソル (11 s left)")
    *frames, last = terminal.frames()
    assert all(display_width(frame) <= 39 for frame in frames)
    assert frames[0].startswith("[0:00] decide: ")
    assert frames[0].endswith(" (12 s left)")
    assert last == ""


def test_line_follows_the_width_of_the_terminal(terminal):
    text = "x" * 200
    with LiveLine(terminal.stream) as line:
        line(text)
        assert {display_width(frame) for frame in terminal.frames()} == {39}
        terminal.resize(12)
        line(text)
        assert {display_width(frame) for frame in terminal.frames()} == {11}
        terminal.resize(1)
        line(text)
        assert {display_width(frame) for frame in terminal.frames()} == {0}
        terminal.resize(0)  # unknown
        line(text)
        assert {display_width(frame) for frame in terminal.frames()} == {79}


def test_warnings_stay_on_a_terminal(terminal):
    with LiveLine(terminal.stream) as line:
        line("prune")
        line("warning: few tokens")
        line("verify")
    assert "warning: few tokens\r\n" in terminal.text()


def test_line_goes_away_after_an_error(terminal):
    def work():
        with LiveLine(terminal.stream) as line:
            line("prune")
            raise KeyError

    with pytest.raises(KeyError):
        work()
    assert terminal.text().endswith("\r\x1b[K")


@pytest.mark.parametrize("term", ["dumb", "", None])
def test_a_terminal_that_cannot_replace_a_line_gets_plain_ones(terminal, monkeypatch, term):
    if term is None:
        monkeypatch.delenv("TERM")
    else:
        monkeypatch.setenv("TERM", term)
    with LiveLine(terminal.stream) as line:
        line("prune")
    assert terminal.text() == "[0:00] prune\r\n"


def test_nothing_is_coloured(terminal, monkeypatch):
    """So NO_COLOR has nothing to turn off."""
    monkeypatch.setenv("NO_COLOR", "1")
    with LiveLine(terminal.stream) as line:
        line("warning: prune")
        line("prune")
    assert terminal.text().replace("\r\x1b[K", "").count("\x1b") == 0


def test_a_terminal_that_is_gone_does_not_end_the_work(terminal):
    with LiveLine(terminal.stream) as line:
        os.close(terminal.master)
        line("prune")
        line("verify")


@pytest.mark.parametrize("quiet", [False, True])
def test_stdout_holds_the_result_alone(capfd, quiet):
    """Not what libraries, user code and child processes print while a command works."""
    with progress(quiet) as say:
        say("working")
        print("from a library")
        os.write(1, b"from native code\n")
        os.system("echo from a child")
    show("", {"answer": 42}, "json", 5)
    out, err = capfd.readouterr()
    assert json.loads(out) == {"answer": 42, "exit_code": 5}
    printed = ["from a library", "from native code", "from a child", "working"]
    assert [text in err for text in printed] == [not quiet] * 4


def test_stdout_comes_back_after_an_error(capfd):
    stdout = sys.stdout
    with pytest.raises(KeyError), progress(False):
        raise KeyError
    assert sys.stdout is stdout
    os.write(1, b"here\n")
    assert capfd.readouterr().out == "here\n"


def test_columns_of_a_table_hold_wide_characters():
    rows = table([["日本", "1"], ["abc", "22"]], ["layer", "ms"]).splitlines()
    assert [display_width(row) for row in rows] == [9, 9, 9, 9]
