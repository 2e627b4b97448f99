"""The command `inspect`: describes an SAE, and how well it fits a model.

python sae_loader.py EleutherAI/sae-pythia-160m-32k                    # from its files; needs no model
python sae_loader.py EleutherAI/sae-pythia-160m-32k --model_name EleutherAI/pythia-160m --layers 3,6
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from delta_selectivity.cli.command_line import add_flags, add_verbose, make_request, parse_values
from delta_selectivity.cli.guard import guarded, set_log_level
from delta_selectivity.cli.parser import Parser
from delta_selectivity.cli.program import command_text
from delta_selectivity.errors import RequestError
from delta_selectivity.system.comma_lists import parse_names
from delta_selectivity.system.terminal import show

EXAMPLES = """\
examples:
  {inspect} EleutherAI/sae-pythia-160m-32k
      print what its files say: format, layers, widths, hook point
  {inspect} EleutherAI/sae-pythia-160m-32k --model_name EleutherAI/pythia-160m --layers 3,6
      print also how well it reconstructs each layer and hook point of the model
"""

WITHOUT_MODEL = ("saes", "layers", "hookpoint", "verbose")
FLAGS = (
    "model_name", "datasets", "dataset_file", "dataset_split", "dataset_columns", "data_dir", "layers", "hookpoint",
    "bos", "shuffle_select_n", "revision", "trust_remote_code", "seed", "dtype", "device1", "cache_dir", "cache_gb",
)  # fmt: skip


def build_parser(prog: str) -> argparse.ArgumentParser:
    """Build the parser of this command."""
    description = "Describe an SAE; with --model_name also how well it fits each layer and hook point of a model."
    parser = Parser(prog, description, epilog=EXAMPLES.format(inspect=command_text("inspect", prog)))
    parser.add_argument(
        "saes", metavar="NAME", help="one or several SAEs, separated by commas: hub id, local folder, release/sae_id "
        "of SAE Lens, a whole release, or a pattern (folder/*)",
    )  # fmt: skip
    add_flags(parser, only=FLAGS)
    add_verbose(parser)
    return parser


def run(argv: Sequence[str], prog: str) -> None:
    """Print the description of the SAEs. Raises `RequestError` if the request is wrong."""
    values = parse_values(argv, build_parser(prog))
    set_log_level(bool(values.get("verbose")))
    if "model_name" in values:
        from delta_selectivity.run.inspection import inspect

        for part in inspect(make_request({**values, "sae_name": values["saes"]})):
            show(part)
        return
    if given := [name for name in values if name not in WITHOUT_MODEL]:
        raise RequestError(f"`{given[0]}` needs a model: give one with `model`")
    from delta_selectivity.run.inspection import describe
    from delta_selectivity.run.request import parse_layers
    from delta_selectivity.saes import expand_names, open_sae

    layers = parse_layers(values.get("layers", "all"))
    names = parse_names(values["saes"])
    if not names:
        raise RequestError("`saes` is empty: give a hub id, a folder, or several")
    sources = [open_sae(name, values.get("hookpoint")) for name in expand_names(names)]
    show("\n\n".join(describe(source, layers) for source in sources))


def main(argv: Sequence[str] | None = None, prog: str = "sae_loader.py") -> int:
    """Run the command and return its exit code."""
    return guarded(argv, lambda arguments: run(arguments, prog))
