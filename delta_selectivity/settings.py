"""The class `Settings`: all options of a run with their defaults, units, help and rules.

    Settings(folds=3, views="error,latents")

Flags, `--help`, validation and the table in `docs/settings.md` are generated from its fields. Rules that need a file,
a model or a device are checked where those are opened. `None` means off or automatic; -1 and "" are not used for that.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from delta_selectivity.errors import RequestError

POSITIONS = ("last", "mean", "all")
PROBE_BACKENDS = ("auto", "torch", "cuml", "sklearn")
DTYPES = ("auto", "float32", "bfloat16", "float16")
BASELINES = ("identity", "random", "pca", "mean", "shuffled", "names")
VIEWS = ("model", "sae", "error", "latents", "ksparse")
LATENT_VIEWS = frozenset({"latents", "ksparse"})
"""Views of the SAE's codes."""
BOS = ("auto", "counted", "excluded", "none")
KEPT_TEXTS = ("public", "all", "none")
PROBING = ("folds", "repeats", "seed", "views", "epsilon", "probe")
"""The fields that apply when activations already exist."""


_IN_WORDS: dict[type, str] = {bool: "True or False", int: "a whole number", float: "a number", str: "a string"}


@dataclass(frozen=True)
class Rule:
    """The help of a field and the values that it accepts."""

    help: str
    group: str  # "what", "how" or "where": its heading in `--help`
    if_none: str = ""  # the meaning of None
    choices: tuple[str, ...] = ()  # valid names, for a single one or each in a tuple
    minimum: float = -math.inf
    above: float = -math.inf
    below: float = math.inf
    if_alone: str = ""  # the value of the flag if it is given without a value
    in_key: bool = False  # whether result files with a different value are rejected


def _setting(default: Any, group: str, help: str, **rule: Any) -> Any:
    return dataclasses.field(default=default, metadata={"rule": Rule(help, group, **rule)})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Options of a run, other than the model, SAEs, tasks, layers and paths.

    Fields that hold several names accept a tuple or a string with commas. An invalid value raises `RequestError`, which
    names the field.

    Example:
        >>> Settings(views="error").views
        ('model', 'sae', 'error')
        >>> Settings(folds=1)
        Traceback (most recent call last):
        delta_selectivity.errors.RequestError: `folds` must be at least 3, got 1
    """

    hookpoint: str | None = _setting(
        None, "what", "resid_post, resid_pre, resid_mid, mlp_out, mlp_post, attn_out, mlp_in, attn_in, z, or a module "
        "path with <layer> (its input with :in), by our names or SAE Lens's", if_none="as the SAE's config says",
    )  # fmt: skip
    positions: str = _setting(
        "last", "what", "last token of the name, mean over its tokens, or all its tokens, each weighted 1/len",
        choices=POSITIONS, in_key=True,
    )  # fmt: skip
    bos: str = _setting(
        "auto", "what", "whether texts begin with BOS, and whether it counts in the whole-text figures; auto: as in "
        "training; if that is unknown, excluded if the model has one", choices=BOS,
    )  # fmt: skip
    shuffle_select_n: int | None = _setting(
        None, "what", "at most this many rows per dataset, drawn by seed, classes balanced", if_none="all", minimum=1
    )
    views: tuple[str, ...] = _setting(
        ("model", "sae"), "what", "views to probe: model and sae always; error adds the reconstruction error, latents "
        "the SAE's codes, ksparse its 1, 2, 5 and 16 best latents", choices=VIEWS, in_key=True,
    )  # fmt: skip
    baselines: tuple[str, ...] = _setting(
        (), "what", "baselines to measure too, in the folder baselines; all: every one", choices=BASELINES
    )
    whole_tokens: int | None = _setting(
        65_536, "what", "tokens of each dataset, drawn by seed, for the whole-text figures (mse_whole, fvu_whole, "
        "dead) and their standard errors; all: every token", if_none="all", minimum=1,
    )  # fmt: skip
    downstream: bool = _setting(
        False, "what", "also run the model with x̂ in place of x: cross-entropy and KL, on about whole_tokens tokens; "
        "needs all of the model's weights, LM head included",
    )  # fmt: skip
    revision: str | None = _setting(
        None, "what", "branch, tag or commit of a hub model, such as Pythia's step3000", if_none="main"
    )
    trust_remote_code: bool = _setting(False, "what", "run code that comes with the model")
    folds: int = _setting(
        5,
        "how",
        "folds of the cross-validation; all rows of a person (or other group) are in one fold",
        minimum=3,
        in_key=True,
    )  # C of a fold is selected on the other folds, so at least two others are needed
    repeats: int = _setting(5, "how", "partitions into folds", minimum=1, in_key=True)
    seed: int = _setting(0, "how", "random seed of the partitions and of shuffle_select_n", minimum=0, in_key=True)
    epsilon: float = _setting(
        0.02, "how", "a delta_sel whose 90 % interval lies within +-this counts as preserved", above=0, below=1,
        in_key=True,
    )  # fmt: skip
    probe: str = _setting("auto", "how", "solver of the probes", choices=PROBE_BACKENDS, in_key=True)
    dtype: str = _setting(
        "auto", "how", "dtype of the model; auto: bfloat16 if the model was saved in it and the device computes in it "
        "fast, else float32. SAEs compute in float32, probes in float64", choices=DTYPES,
    )  # fmt: skip
    batch_size: int | None = _setting(
        None, "where", "most texts in a batch; halved when memory runs out", if_none="by their tokens", minimum=1
    )
    queue_gb: float = _setting(
        2.0, "where", "GB of memory for rows between the threads; collected rows beyond it are in temporary files",
        above=0,
    )  # fmt: skip
    cache_gb: float = _setting(
        50.0,
        "where",
        "size limit of the cache in GB, for all models together; the least recently used data are removed",
        above=0,
    )
    keep_texts: str = _setting(
        "public", "where", "store texts beside the scores, so that reports can show which rows were lost: for public "
        "tasks, for all (your own tables too), or for none", choices=KEPT_TEXTS, if_alone="all",
    )  # fmt: skip
    overwrite: bool = _setting(False, "where", "replace result files made with other settings")
    force: bool = _setting(
        False, "where", "measure an SAE even if the check before the run finds that it fits another site, "
        "normalisation or BOS setting far better",
    )  # fmt: skip

    def __post_init__(self) -> None:
        """Validate every field and sort names into the canonical order."""
        for name in ("views", "baselines"):
            object.__setattr__(self, name, _names(getattr(self, name)))
        if self.baselines == ("all",):
            object.__setattr__(self, "baselines", BASELINES)
        for field, kind, rule in fields():
            value = getattr(self, field.name)
            if isinstance(value, str) and value and value == word_for_none(kind, rule):
                value = None
                object.__setattr__(self, field.name, None)
            _check(field.name, value, kind, rule)
            if kind in (int, float) and value is not None:
                object.__setattr__(self, field.name, _as_python(field.name, value, kind))
        requested = {"model", "sae", *self.views}
        object.__setattr__(self, "views", tuple(view for view in VIEWS if view in requested))


def fields() -> Iterator[tuple[dataclasses.Field[Any], type, Rule]]:
    """Yield the fields of `Settings`, each with the type of its values (other than None) and its rule."""
    hints = typing.get_type_hints(Settings)
    for field in dataclasses.fields(Settings):
        hint = hints[field.name]
        kinds = [kind for kind in typing.get_args(hint) if kind is not types.NoneType]
        if typing.get_origin(hint) is not types.UnionType:
            kinds = [hint]
        yield field, typing.get_origin(kinds[0]) or kinds[0], field.metadata["rule"]


def word_for_none(kind: type, rule: Rule) -> str:
    """Return the word that a number's flag accepts for None, such as "all"; empty if there is none."""
    return rule.if_none if kind is int and rule.if_none.isalpha() else ""


def default_shown(field: dataclasses.Field[Any], rule: Rule) -> str:
    """Return the default as text for help and tables."""
    if field.default is None:
        return rule.if_none
    if isinstance(field.default, bool) or field.default == ():
        return "off"
    return ", ".join(field.default) if isinstance(field.default, tuple) else str(field.default)


def describe() -> str:
    """Return all settings as a Markdown table: name, default, values, meaning."""
    rows = ["| setting | default | values | meaning |", "|---|---|---|---|"]
    for field, kind, rule in fields():
        rows.append(f"| `{field.name}` | {default_shown(field, rule)} | {_values(kind, rule)} | {rule.help} |")
    return "\n".join(rows)


def _values(kind: type, rule: Rule) -> str:
    if rule.choices:
        return ("one of " if kind is str else "some of ") + ", ".join(rule.choices)
    if kind in (int, float):
        return f"{'whole number' if kind is int else 'number'}{_range(rule)}"
    return "on, off" if kind is bool else "text"


def _range(rule: Rule) -> str:
    """Return the bounds in words, beginning with a space or comma."""
    if rule.below < math.inf:
        return f" between {rule.above:g} and {rule.below:g}"
    if rule.above > -math.inf:
        return f" above {rule.above:g}"
    return f", at least {rule.minimum:g}" if rule.minimum > -math.inf else ""


def _check(name: str, value: Any, kind: Any, rule: Rule) -> None:
    if value is None and rule.if_none:
        return
    if kind is tuple:
        for part in value:
            _check(name, part, str, rule)
        return
    abstract: dict[Any, Any] = {int: numbers.Integral, float: numbers.Real}  # NumPy numbers are instances too
    is_bool = isinstance(value, bool)
    if is_bool != (kind is bool) or not isinstance(value, abstract.get(kind, kind)):
        raise RequestError(f"`{name}` must be {_IN_WORDS[kind]}, got {value!r}")
    if rule.choices and value not in rule.choices:
        raise RequestError(f"`{name}` {value!r} is not one of {', '.join(rule.choices)}")
    if kind in (int, float) and not (rule.minimum <= value < rule.below and value > rule.above):
        raise RequestError(f"`{name}` must be{_range(rule).removeprefix(',')}, got {value}")


def _as_python(name: str, value: Any, kind: type) -> Any:
    """Convert a NumPy number or a fraction to a Python number."""
    try:
        return kind(value)
    except OverflowError as error:
        raise RequestError(f"`{name}` is too large for a {kind.__name__}") from error


def _names(value: Any) -> Any:
    """Split names from a tuple, a list or a string with commas, without duplicates."""
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    if not isinstance(value, list | tuple | set | frozenset):
        return (value,)
    listed = list(value)
    return tuple(name for i, name in enumerate(listed) if name not in listed[:i])
