"""The benchmark's rows still fit the notebook that they measure."""

import pytest
from conftest import ROOT

from run_notebook import import_script


@pytest.fixture(scope="module")
def bench():
    return import_script(ROOT / "benchmarks/bench.py")


@pytest.mark.parametrize(
    ("row", "arguments"),
    [
        ("scan_row", ("torch", 1, 16, 8, 2, 1)),
        ("step_row", ("float32", False, 10, 5)),
        ("throughput_row", ("float32", 2, 32)),
        ("growth_row", ("mamba", 16, 1, 16, 2)),
        ("growth_row", ("attention", 16, 1, 32, 2)),
    ],
)
def test_every_kind_of_row_is_measured(bench, monkeypatch, row, arguments):
    monkeypatch.setattr(bench, "REPEATS", 2)
    monkeypatch.setattr(bench, "WARM_UP", 1)
    numbers = getattr(bench, row)(*arguments)
    assert bench.describe(numbers)
    assert all(value > 0 for key, value in numbers.items() if key != "added_mib")


def test_the_rows_name_functions_that_there_are(bench):
    kinds = {work[0] for work in bench.rows().values() if not isinstance(work, str)}
    assert {"scan_row", "step_row", "throughput_row", "growth_row"} <= kinds
    assert all(callable(getattr(bench, kind)) for kind in kinds)


def test_a_row_comes_back_from_its_own_process(bench, monkeypatch):
    monkeypatch.setattr(bench, "ON_GPU", False)
    name = next(name for name in bench.rows() if name.startswith("growth, attention encoder, 512 tokens"))
    assert bench.run_row(name, *bench.rows()[name]).get("forward_ms", 0) > 0
