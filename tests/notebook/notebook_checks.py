"""What an executed notebook must be: the committed one, and one that a test has run."""

import json
import re

from conftest import notebook_cells

TITLES = [
    "Imports", "Helper functions", "BiMamba", "MambaEncoder", "Learnable position tokens", "LAINR decoder", "MambaGINR",
    "Training functions", "Data loading", "Hyperparameters and model", "Training loop", "Super-resolution test",
    "Final analysis",
]  # fmt: skip

RESULTS = {
    "dataset", "train_images", "device", "epochs", "steps", "parameters", "psnr_mean", "psnr_of_mean_mse", "psnr_worst",
    "bit_exact_share", "ms_per_step", "images_per_s", "peak_memory_gib", "minutes",
}  # fmt: skip


# Once in some hundred runs ipykernel 7 answers its last request, to shut down, when its sockets are closed already.
FAREWELL = re.compile(r"ERROR:tornado\.\S+:.*\nTraceback [^\n]*\n(?:[ \t][^\n]*\n|\n)*[^\n]*\n?")


def without_farewell(stderr: str) -> str:
    """What a run wrote, less what its kernel's messaging reported as the kernel was shut down."""

    def kept(found: re.Match) -> str:
        return "" if re.search(r'ipykernel/kernelbase\.py", line \d+, in process_control\n', found[0]) else found[0]

    return FAREWELL.sub(kept, stderr)


def check_outputs(path):
    """Executed once from top to bottom, with nothing in the outputs that a reader should not see."""
    cells = notebook_cells("code", path)
    assert [c["source"].split("\n")[0] for c in cells] == [f"# Cell {i}: {t}" for i, t in enumerate(TITLES, 1)]
    assert [c["execution_count"] for c in cells] == list(range(1, 14))
    outputs = [(i, o) for i, c in enumerate(cells, 1) for o in c["outputs"]]
    assert [i for i, o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"] == []
    assert [i for i, o in outputs if any("widget" in kind for kind in o.get("data", {}))] == []
    assert "widgets" not in json.loads(path.read_text(encoding="utf-8"))["metadata"]
    text = json.dumps([{k: v for k, v in o.items() if k != "data"} for _, o in outputs])
    assert not re.search(r"warning: |Traceback|(?<![\w.])/(home|root|tmp|work|opt|usr|mnt)/", text)
    pictures = [(i, kind) for i, o in outputs for kind in o.get("data", {}) if kind.startswith("image/")]
    assert [i for i, _ in pictures] == [11, 12, 13]
    assert path.stat().st_size < 1_000_000
