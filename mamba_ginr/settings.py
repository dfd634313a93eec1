"""Settings of the notebook: what its cell 10 says, what a choice changes of it, and what the environment sets."""

import math


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


def choose_settings(names: dict, choices: dict, environment: dict) -> dict:
    """The settings among ``names``: numbers, texts and switches in capitals, and what ``choices`` change of them.

    ``choices`` maps a setting to what each of its values changes: {"OPTIMIZER": {"adamw": {"LEARNING_RATE": 1e-3}}}.
    What the environment sets comes last. A line is printed for each choice of a text that changes something.
    ValueError for a value that is no choice, a count of 0, and what ``settings_from_environment`` refuses.
    """
    defaults = {n: v for n, v in names.items() if n.isupper() and isinstance(v, (bool, int, float, str))}
    asked, changes = settings_from_environment(defaults, environment), {}
    for name, table in choices.items():
        value = asked[name]
        if value not in table:
            raise ValueError(f"{name} = {value!r}: choose one of {', '.join(map(str, table))}")
        changes |= table[value]
        if table[value] and isinstance(value, str):
            print(f"{name} = {value} sets {', '.join(f'{n} = {v}' for n, v in table[value].items())}.")
    settings = settings_from_environment(defaults | changes, environment)
    for name in POSITIVE:
        if settings[name] < 1:
            raise ValueError(f"{name} = {settings[name]}: at least 1")
    return settings
