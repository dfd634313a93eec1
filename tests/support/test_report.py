"""What is printed: in terminals whose encoding has few characters."""

import io
import sys

import pytest

from mamba_ginr.report import print_anywhere


@pytest.mark.parametrize(
    ("encoding", "errors", "printed"),
    [
        ("ascii", "strict", b"2?2 ? 1 ?"),
        ("cp1252", "strict", b"2\xd72 ? 1 \x85"),
        ("ascii", "surrogateescape", b"2?2 ? 1 ?"),  # LANG=C
        ("utf-8", "strict", "2×2 − 1 …".encode()),
        ("ascii", "backslashreplace", rb"2\xd72 \u2212 1 \u2026"),  # somebody's own choice
    ],
)
def test_what_a_terminal_lacks_is_a_question_mark(monkeypatch, encoding, errors, printed):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding, errors))
    print_anywhere()
    print("2×2 − 1 …", end="", flush=True)
    assert raw.getvalue() == printed


def test_streams_that_have_no_encoding_are_left_alone(monkeypatch):
    for stream in (None, io.StringIO()):  # of a program without a console, or of a notebook
        monkeypatch.setattr(sys, "stdout", stream)
        print_anywhere()
        assert sys.stdout is stream
