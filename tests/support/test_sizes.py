"""The benchmark of sizes measures the notebook's model at any size, and draws what it found."""

import pytest
from conftest import ROOT

from run_notebook import import_script


@pytest.fixture(scope="module")
def sizes():
    return import_script(ROOT / "benchmarks/sizes.py")


def test_a_model_of_each_kind_is_measured(sizes, monkeypatch):
    monkeypatch.setattr(sizes.bench, "REPEATS", 1)
    monkeypatch.setattr(sizes.bench, "WARM_UP", 1)
    for kind in sizes.KINDS:
        row = sizes.measure(40, 4, kind, 2 * 40 * 40)
        assert row["images"] == 2
        assert min(row["infer_ms"], row["train_ms"]) > 0


def test_growth_is_of_a_pixels_cost_and_drawn(sizes, tmp_path):
    rows = [
        {"kind": kind, "patch_size": patch, "side": side, "images": 512**2 // side**2, "train_ms": 1.0, "infer_ms": 2.0}
        for kind in sizes.KINDS for patch in (2, 4) for side in (32, 64, 512)
    ]  # fmt: skip
    rows[2]["train_ms"] = 1.1
    assert sizes.growth(rows, "BiMamba", 2, "train_ms") == pytest.approx(0.1)
    assert sizes.growth(rows, "BiMamba", 4, "train_ms") == 0
    gpus = [{"gpus": n, "images_per_s": 3000 * n} for n in (1, 2, 4)]
    results = {"device": "here", "torch": "2", "rows": rows}
    for number, more in enumerate(({}, {"gpus": gpus})):
        sizes.draw(results | more, tmp_path / f"{number}.png")
        assert (tmp_path / f"{number}.png").stat().st_size > 10_000
