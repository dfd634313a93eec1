"""What is printed: in terminals whose encoding has few characters."""

import io
import json
import sys

import pytest
from conftest import ROOT

from mamba_ginr.report import ENLARGEMENT_HEADER, enlargement_lines, print_anywhere
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


def test_the_table_has_a_line_for_each_model():
    one = {"nearest": 20.0, "bicubic": 25.5, "lanczos": 26.0, "model": 27.25, "consistency": 70.0}
    of_one = enlargement_lines("photographs ×2", 1000, {"MAMBA-GINR": one})
    assert of_one.split() == ["photographs", "×2", "(1,000)", "20.00", "25.50", "26.00", "27.25", "+1.75", "70.00"]
    of_two = enlargement_lines("photographs ×2", 1000, {"small run": {**one, "model": 25.0}, "committed weights": one})
    lines = of_two.split("\n")
    assert [line.split()[-3:] for line in lines[1:]] == [["25.00", "-0.50", "70.00"], ["27.25", "+1.75", "70.00"]]
    assert lines[0] == of_one[: len(lines[0])]
    assert {len(line) for line in (of_one, *lines[1:])} == {len(ENLARGEMENT_HEADER)}


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
