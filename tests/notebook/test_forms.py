"""The text-book cells and their fast forms: alike as they stand, and what an edited cell does."""

import runpy

import pytest
import torch
from conftest import ROOT

from mamba_ginr.kernels import backends
from mamba_ginr.kernels.forms import difference_of_forms


@pytest.mark.parametrize("decoder", ["lainr", "gaussian", "scent", "hybrid"])
def test_outputs_and_gradients_are_those_of_the_cells(nb, decoder):
    full = {**nb.MambaGINR().config, "decoder": decoder}
    assert difference_of_forms(nb.MambaGINR, full) < 1e-4
    # The small run's hybrid has a weight whose gradient is 0.002, of which float32's rounding is 1e-4.
    bound = 3e-4 if decoder == "hybrid" else 1e-4
    assert difference_of_forms(nb.MambaGINR, {**nb.model_config, "decoder": decoder}) < bound


def test_they_are_compared_whatever_backend_was_chosen(nb, monkeypatch):
    monkeypatch.setitem(backends._chosen, "backend", "mamba_ssm")
    assert difference_of_forms(nb.MambaGINR, nb.model_config) < 1e-4
    assert backends._chosen["backend"] == "mamba_ssm"


@pytest.mark.parametrize("spoil", [lambda x: x * torch.nan, lambda x: x[:, :-1]], ids=["not a number", "fewer tokens"])
def test_a_fast_form_that_gives_no_such_numbers_does_not_agree(nb, monkeypatch, spoil):
    fast_encoder = nb.fast_encoder
    monkeypatch.setattr(nb, "fast_encoder", lambda *parts: spoil(fast_encoder(*parts)))
    assert not difference_of_forms(nb.MambaGINR, nb.model_config) < 1e-3


@pytest.mark.parametrize(("precision", "apart", "least"), [(torch.float32, 0.001, 75), (torch.float16, 0.3, 70)])
def test_the_committed_weights_reconstruct_alike_in_both_forms(nb, precision, apart, least):
    model, _ = nb.load_model(ROOT / "checkpoints/mamba_ginr_best.pth")
    images = torch.randint(0, 256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    model.precision, scores = precision, []
    for model.fused in (True, False):
        scores.append(nb.evaluate(model, images, 2)["psnr_mean"])
    assert scores[0] == pytest.approx(scores[1], abs=apart)
    assert min(scores) > least


EDITS = {
    "Block": ("x = x + self.mixer(self.norm1(x))", "x = x + 0.5 * self.mixer(self.norm1(x))"),
    "Mamba": ("delta = F.softplus(self.dt_proj(r))", "delta = F.softplus(self.dt_proj(r)) + 0.01"),
    "CrossAttention": ("(logits + bias).softmax(dim=-1)", "logits.softmax(dim=-1)"),
    "LAINRDecoder": ("x = self.blocks(x.float())", "x = x.float()"),
}


@pytest.mark.parametrize("name", [None, *EDITS])
def test_an_edited_line_takes_effect_at_once_and_a_line_says_so(script, name, tmp_path, monkeypatch, capsys):
    cells = script.read_text(encoding="utf-8").split("# Cell 11")[0]
    if name:
        before, after = EDITS[name]
        assert cells.count(before) == 1
        cells = cells.replace(before, after)
    small = {"SMALL": 1, "DATASET": "photos", "DIM": 8, "DEPTH": 1, "DECODER_DIM": 16, "D_STATE": 2, "HEAD_BLOCKS": 1}
    for setting, value in small.items():
        monkeypatch.setenv(f"MAMBA_GINR_{setting}", str(value))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "edited.py").write_text(cells, encoding="utf-8")
    names = runpy.run_path(str(tmp_path / "edited.py"), run_name="__main__")
    said = "were edited, and run as they stand: they no longer agree" if name else "agree"
    assert f"Cells 3 to 6 {said} with their fast forms" in capsys.readouterr().out
    assert names["model"].fused == names["settings"]["FUSED"] == (name is None)
    loaded, _ = names["load_model"](ROOT / "checkpoints/mamba_ginr_best.pth")
    assert loaded.fused == (name is None)
