"""Settings of the notebook: what its cell 10 says, what a choice changes of it, and what the environment sets."""

import math
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from mamba_ginr.parallel import processes

DECODERS = "lainr", "gaussian", "scent", "hybrid"


def parse_setting(name: str, text: str, default: bool | int | float | str) -> bool | int | float | str:
    """Read ``text`` as the type of ``default``; ValueError says what would have been valid."""
    kind = type(default)
    try:
        if kind is bool:
            return {"0": False, "false": False, "1": True, "true": True}[text.lower()]
        value = kind(text)
        if kind is not str and not 0 <= value < math.inf:
            raise ValueError
        return value
    except (KeyError, ValueError):
        valid = "0, 1, false or true" if kind is bool else f"{kind.__name__} of at least 0"
        raise ValueError(f"MAMBA_GINR_{name}={text!r}: expected {valid}, such as {default}") from None


def decoder_suffix(decoder: str) -> str:
    """What the names of a decoder's files end in; those of the default, lainr, in nothing."""
    return "" if decoder == "lainr" else f"_{decoder}"


def settings_from_environment(defaults: dict, environment: dict) -> dict:
    """Return ``defaults`` with every MAMBA_GINR_<NAME> of the environment in its place.

    Raises ValueError for an unknown name (listing the valid ones) or a value of the wrong type.
    """
    settings = dict(defaults)
    for key in sorted(k for k in environment if k.startswith("MAMBA_GINR_")):
        name = key.removeprefix("MAMBA_GINR_")
        if name not in defaults:
            valid = ", ".join(f"MAMBA_GINR_{n}" for n in sorted(defaults))
            raise ValueError(f"{key} is not a setting of this notebook. Valid: {valid}")
        settings[name] = parse_setting(name, environment[key], defaults[name])
    return settings


POSITIVE = "EPOCHS", "EVAL_BATCH", "QUERY_CHUNK"
NOT_NEGATIVE = """
    HELD_OUT MAX_TRAIN_IMAGES MAX_TEST_IMAGES MAX_PHOTOGRAPHS NUM_LP WARMUP_EPOCHS HARD_FRACTION SR_FRACTION SR_QUERIES
    LEARNING_RATE WEIGHT_DECAY MUON_DECAY EMA_SHARE REFINE_STEPS REFINE_RATE
""".split()
PLACES = "DATA_DIR", "OUTPUT_DIR", "PRETRAINED"
PRECISIONS = "float16", "bfloat16", "float32"


def plain(name: str, value):
    """The setting as a number, a text or a switch of Python's; ValueError for a list and the like.

    A path becomes text, as a dtype does, and a number of NumPy's or PyTorch's one of Python's. What is no value (a
    table, a class, a module, a function) stays as it is.
    """
    if isinstance(value, type):
        return value
    if name in PLACES and isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if hasattr(value, "item") and getattr(value, "shape", None) == ():
        return value.item()
    if value is None or isinstance(value, (list, tuple, set, complex, bytes, os.PathLike)) or hasattr(value, "item"):
        raise ValueError(
            f"{name} = {value!r}: a setting is a number, a text, True or False. A name in small letters is none; where "
            f"the line is gone, del {name}"
        )
    return value


def choose_settings(names: dict, choices: dict, environment: dict) -> dict:
    """The settings among ``names``: numbers, texts and switches in capitals, and what ``choices`` change of them.

    ``choices`` maps a setting to what each of its values changes: {"OPTIMIZER": {"adamw": {"LEARNING_RATE": 1e-3}}}.
    A later choice wins over an earlier one, the environment over all. A line is printed for each choice that changes a
    value. ValueError for a value that is no choice, a count of 0, and what ``settings_from_environment`` refuses.
    """
    names = {name: plain(name, value) for name, value in names.items() if name.isupper()}
    defaults = {n: v for n, v in names.items() if isinstance(v, (bool, int, float, str))}
    asked, changes = settings_from_environment(defaults, environment), {}
    for name, table in choices.items():
        if asked[name] not in table:
            raise ValueError(f"{name} = {asked[name]!r}: choose one of {', '.join(map(str, table))}")
        changes |= dict.fromkeys(table[asked[name]], name)
    values = {n: plain(n, choices[name][asked[name]][n]) for n, name in changes.items()}
    for n, name in changes.items():
        if n not in defaults:
            raise ValueError(f"{name} = {asked[name]!r} sets {n}, which is no setting of this notebook")
        if not isinstance(values[n], (bool, int, float, str)):
            raise ValueError(f"{n} = {values[n]!r}: a setting is a number, a text, True or False")
    settings = settings_from_environment(defaults | values, environment)
    settings |= {name: os.path.expanduser(settings[name]) for name in PLACES if name in settings}  # ~ is one's home
    for choice in choices:
        changed = [n for n, name in changes.items() if name == choice and settings[n] == values[n] != defaults[n]]
        if changed:
            what = ", ".join(f"{n} = {settings[n]} (not {defaults[n]})" for n in changed)
            print(f"{choice} = {asked[choice]} sets {what}.")
    for name in NOT_NEGATIVE:
        if name in settings and (isinstance(settings[name], str) or not settings[name] >= 0):
            raise ValueError(f"{name} = {settings[name]!r}: a number, at least 0")
    if not isinstance(settings.get("REFINE_STEPS", 0), int):  # a long training later would be too late
        raise ValueError(f"REFINE_STEPS = {settings['REFINE_STEPS']!r}: a whole number, at least 0")
    for name in POSITIVE:
        if not isinstance(settings[name], int) or settings[name] < 1:
            raise ValueError(f"{name} = {settings[name]!r}: at least 1, and a whole number")
    if settings.get("PRECISION", "float32") not in PRECISIONS:
        raise ValueError(f"PRECISION = {settings['PRECISION']!r}: choose one of {', '.join(PRECISIONS)}")
    return settings


AFTERWARDS = "REFINE_STEPS", "REFINE_RATE"  # of what follows a run
# What two machines, or the same run continued elsewhere, may have differently.
ELSEWHERE = """
    SMALL TRAIN PRETRAINED DATASET DATA_DIR OUTPUT_DIR MAX_TEST_IMAGES MAX_PHOTOGRAPHS QUERY_CHUNK EVAL_BATCH
    SCAN_BACKEND COMPILE FUSED
""".split()


def what_a_run_shares(settings: dict, names: dict | None = None) -> dict:
    """The settings that a resumed run must share with its state: all but those of place, reporting and refining.

    ``names`` are the notebook's now: ValueError where one was set after cell 10, which would change nothing.
    """
    used = {name: value for name, value in settings.items() if name not in ELSEWHERE}
    if late := [f"{n} = {names[n]!r} (not {v!r})" for n, v in used.items() if names and names.get(n, v) != v]:
        raise ValueError(
            f"set after cell 10, where it has no effect: {', '.join(late)}. Set it in cell 10, and run that."
        )
    return {name: value for name, value in used.items() if name not in AFTERWARDS}


def check_output(output: str) -> None:
    """ValueError unless the folders of checkpoints and figures can be made and written; nothing is left in them."""
    for folder in (Path(output), Path(output) / "checkpoints", Path(output) / "figures"):
        try:
            place = next(path for path in (folder, *folder.absolute().parents) if path.exists() or path.is_symlink())
            with tempfile.TemporaryFile(dir=place):
                pass
        except OSError as error:
            raise ValueError(
                f"OUTPUT_DIR = {output!r}: {folder} cannot be written to ({error.strerror or error}), and a run could "
                f"keep nothing. Set OUTPUT_DIR to a folder that can be."
            ) from None


def announce(settings: dict, environment: dict, device: torch.device) -> None:
    """Say what kind of run this is, what was set from outside, and where it runs.

    ValueError if it would overwrite a full run's files, or could write none.
    """
    train, small, output = (settings[name] for name in ("TRAIN", "SMALL", "OUTPUT_DIR"))
    if (small or not train) and Path(output).resolve() == Path.cwd():
        raise ValueError("only a full training run writes here: set OUTPUT_DIR to another folder than this one")
    check_output(output)
    if train and "IMAGE_SIZE" in settings:  # before a large folder is read
        check_model({name.lower(): value for name, value in settings.items()})
    if not train:
        print(f"TRAIN is off: the weights of {settings['PRETRAINED']}; files go to {output}/ only.")
    elif small:
        print(f"SMALL: a reduced model and a short run for a machine without a GPU; files go to {output}/ only.")
    outside = [n for n in settings if f"MAMBA_GINR_{n}" in environment and not n.endswith("_DIR")]
    print("Set from outside:", ", ".join(f"{n} = {settings[n]}" for n in outside) or "nothing")
    print(f"Device: {describe(device)} · PyTorch {torch.__version__}")


def describe(device: torch.device) -> str:
    """What trains: the processor, a GPU, or several; and what would train on all where there are more."""
    name, count = torch.cuda.get_device_name() if device.type == "cuda" else "CPU", processes()
    if count > 1:
        return f"{count} × {name}" if device.type == "cuda" else f"{name}, {count} processes"
    there = torch.cuda.device_count() if device.type == "cuda" else 1
    return name if there < 2 else f"{name}, one of {there} GPUs (make run GPUS={there} trains on all)"


def check_model(config: dict) -> None:
    """ValueError for a configuration of cell 7's MambaGINR of which no model can be built."""
    needed = ["depth", "d_state", "d_conv", "expand", "decoder_dim", "head_dim", "head_hidden"]
    if config["decoder"] in ("scent", "hybrid"):
        needed.append("decoder_blocks")  # without one no query reads the latents
    if low := [f"{name} = {config[name]}" for name in needed if config[name] < 1]:
        raise ValueError(f"{', '.join(low)}: at least 1")
    patch, size, dim = (config[name] for name in ("patch_size", "image_size", "dim"))
    if patch < 1 or size < patch or size % patch or dim % 2:
        raise ValueError(f"patch_size {patch} must divide image_size {size}, and dim {dim} be even")
    harmonics = 2 * (patch // 2)
    if config["num_frequencies"] < harmonics:
        least = f"{harmonics} for patch_size {patch}"
        raise ValueError(f"num_frequencies must be at least {least}, got {config['num_frequencies']}")
    if config["decoder"] not in DECODERS:
        raise ValueError(f"decoder = {config['decoder']!r}: choose one of {', '.join(DECODERS)}")


def check_images(images: Tensor, size: int, weights: torch.dtype = torch.float32) -> None:
    """ValueError for images that are not (B, 3, size, size), or not float; TypeError for a model not in float32."""
    if weights != torch.float32:
        raise TypeError(
            f"the model's weights are {weights}; they, the residual streams and the colours need float32. Take "
            f"model.float(), or load it again, and for faster products model.precision = torch.bfloat16 or "
            f"torch.float16"
        )
    if tuple(images.shape[1:]) != (3, size, size) or not images.is_floating_point():
        got = f"{tuple(images.shape)} {images.dtype}"
        raise ValueError(f"images must be (B, 3, {size}, {size}), float in [0, 1], got {got}")
