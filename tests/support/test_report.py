"""What is printed: in terminals whose encoding has few characters."""

import io
import json
import sys

import pytest
from conftest import ROOT

from mamba_ginr.report import print_anywhere
from run_notebook import import_script


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


def test_benchmarks_print_and_write_in_any_terminal(monkeypatch, tmp_path):
    bench = import_script(ROOT / "benchmarks/bench.py")
    (tmp_path / "benchmarks").mkdir()
    for name, value in {"ROOT": tmp_path, "rows": lambda: {"32×32": "no GPU"}, "draw_growth": lambda *_: {}}.items():
        monkeypatch.setattr(bench, name, value)
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, "ascii"))
    monkeypatch.setattr(sys, "argv", ["bench.py"])
    bench.main()
    sys.stdout.flush()
    assert b"\n32?32 " in raw.getvalue()
    (written,) = (tmp_path / "benchmarks").iterdir()
    assert json.loads(written.read_text(encoding="utf-8"))["rows"] == {"32×32": {"not_run": "no GPU"}}
