"""The tests import the notebook's own code cells, written to a temporary module, and run them as a script too."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_runs import SETTINGS

# A shell's background jobs ignore SIGINT, those of nohup SIGHUP, and so would the runs that the tests start and end.
for name, handler in (("SIGINT", signal.default_int_handler), ("SIGHUP", lambda *_: None)):
    if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) is signal.SIG_IGN:
        signal.signal(getattr(signal, name), handler)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton's kernels then run on the CPU, slowly, as tests need them

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "mamba_ginr_cifar10.ipynb"
sys.path.insert(0, str(ROOT))
for name in [n for n in os.environ if n.startswith("MAMBA_GINR_")]:
    del os.environ[name]  # settings of the person who runs the tests must not change them

from mamba_ginr.kernels import use_backend  # noqa: E402
from run_notebook import import_script, write_script  # noqa: E402

pytest.register_assert_rewrite("notebook_checks", "stand_ins")  # what fails in them is shown with its values, too


def notebook_cells(kind: str, path: Path = NOTEBOOK) -> list[dict]:
    """Cells of a kind, "code" or "markdown", with their sources joined."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [{**c, "source": "".join(c["source"])} for c in cells if c["cell_type"] == kind]


@pytest.fixture(scope="session")
def script(tmp_path_factory) -> Path:
    """The code cells in one file: a module to import, and a program when it is run."""
    return write_script(NOTEBOOK, tmp_path_factory.mktemp("notebook") / "notebook_cells.py")


@pytest.fixture(scope="session")
def nb(script):
    """The notebook as a module."""
    return import_script(script)


@pytest.fixture
def run_script(script, tmp_path):
    """Run the notebook as a program in an empty folder, with settings; returns the finished process."""

    def run(timeout: float = 120, cwd: Path = tmp_path, **settings) -> subprocess.CompletedProcess:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"}
        environment |= {f"MAMBA_GINR_{name}": str(value) for name, value in settings.items()}
        command = [sys.executable, str(script)]
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)

    return run


@pytest.fixture
def triton_backend():
    """The Triton backend for a test, in the interpreter where there is no GPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    use_backend("triton", device)
    yield
    use_backend("auto", device)


@pytest.fixture
def compiled_sizes(tmp_path):
    """Run a program that compiles Triton kernels for a GPU that need not be here; returns the sizes it prints."""

    def run(program: str) -> list[int]:
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
        # From a file, because Triton reads the source of what it compiles.
        (tmp_path / "compile.py").write_text(program)
        command = [sys.executable, str(tmp_path / "compile.py")]
        process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert process.returncode == 0, process.stderr
        return [int(size) for size in process.stdout.split()]

    return run


@pytest.fixture
def batch_of(nb):
    """One training batch of all these images, the last of them replaced by hard ones and by mosaics."""

    def build(images, mosaics: int = 0, hard: int = 0, step: int = 0):
        return nb.Sampler(images, len(images), hard, mosaics, 64, seed=0)(0, step)

    return build


@pytest.fixture
def tiny(nb):
    """Build a model small enough for a test, always with the same weights."""

    def build(seed: int = 0, **changes):
        torch.manual_seed(seed)
        config = {"image_size": 8, "patch_size": 2, "dim": 16, "depth": 1, "d_state": 4, "num_lp": 16}
        config |= {"position_scale": 1.0, "head_dim": 8, "head_blocks": 1, "head_hidden": 16}
        config |= {"decoder_dim": 32, "decoder_blocks": 1}
        return nb.MambaGINR(**{**config, "num_frequencies": 8, **changes})

    return build


@pytest.fixture
def data(nb):
    generator = torch.Generator().manual_seed(0)
    train, held_out, test = (
        torch.randint(0, 256, (n, 3, 8, 8), generator=generator, dtype=torch.uint8) for n in (44, 6, 6)
    )
    return nb.ImageData("noise", train, held_out, test)


@pytest.fixture
def start(nb, tiny, data):
    """Train the tiny model in a folder, as cell 11 does; a fresh model each time, as after a restart."""

    def run(folder, identity=None, **changes):
        return nb.train(tiny(), data, SimpleNamespace(**{**SETTINGS, **changes}), identity or {"DIM": 16}, folder)

    return run
