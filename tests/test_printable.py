"""Text that a terminal or a file of UTF-8 can show, whatever the names of files are."""

from __future__ import annotations

from sparse_onnx.printable import printable


def test_printable() -> None:
    assert printable("plain \u6a21") == "plain \u6a21"
    assert printable("\u6a21".encode().decode("ascii", "surrogateescape")) == "\u6a21"
    assert printable(b"\xe8".decode("utf-8", "surrogateescape")) == "\ufffd"
