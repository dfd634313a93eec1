"""The versions that the files ask for are those that were run."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def test_the_files_agree_on_the_oldest_versions():
    required = re.findall(r"^(torch|torchvision)>=([\d.]+)$", (ROOT / "requirements.txt").read_text(), re.M)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = [*project["dependencies"], *project["optional-dependencies"]["notebook"]]
    assert [f"{name}>={version}" for name, version in required] == [d for d in declared if d.startswith("torch")]
    run = re.search(r"run with Python ([\d.]+) and [\d.]+, PyTorch ([\d.]+) and", (ROOT / "README.md").read_text())
    assert project["requires-python"] == f">={run[1]}"
    assert dict(required)["torch"] == run[2]
