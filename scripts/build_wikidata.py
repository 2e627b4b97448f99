#!/usr/bin/env python3
"""Build the five Wikidata tasks from a Wikidata dump and a folder of texts that mention its people.

    python -m scripts.build_wikidata latest-all.json.gz texts/ -o people.parquet
    lbzip2 -dc latest-all.json.bz2 | python -m scripts.build_wikidata - texts/ -o people.parquet   # all cores unpack
    python main.py --dataset_file people.parquet

The dump is https://dumps.wikimedia.org/wikidatawiki/entities/latest-all.json.gz, or a part of it. The bzip2 dump is
smaller, but decompressing it takes ten times as long as all other work: use a program that decompresses on all cores.
The texts are .txt files, or .jsonl files with a field `text`, plain or compressed (.gz, .bz2, .xz, .zst), in the given
folder or below it.

Properties and classes are those of Gurnee et al. 2023 (arXiv 2305.01610). A person counts for a task if exactly one of
their classes belongs to it. People with the same name but different classes do not count. Of each person in the texts,
`--per_name` mentions are drawn with `--seed`. Of each class, the `--per_class` most prominent people are taken (those
with statements for the most properties); if there are two classes, both get the same number. Every text ends with the
name. Label 1 is female, Democratic Party, alive.

Exit codes: 0 the file is written; 1 the work failed, and nothing is written; 2 the request was invalid, or no person
was found; 130 interrupted, and nothing is written.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from delta_selectivity.errors import RequestError
from delta_selectivity.system.interrupts import as_keyboard_interrupt
from delta_selectivity.system.terminal import LineFormatter, show, show_on_stderr
from scripts.wikidata_build import classes, dump, entities, mentions, output, selection, texts
from scripts.wikidata_build.people import Names, PeopleTable

SCRIPTS = Path(__file__).resolve().parent

log = logging.getLogger("build_wikidata")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the flags."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("dump", help="Wikidata's JSON dump: .json, .json.gz, .json.bz2, or - for JSON on stdin")
    made.add_argument("texts", type=Path, help="folder of texts")
    made.add_argument("-o", "--output", type=Path, required=True, help=f"file to write: {', '.join(output.SUFFIXES)}")
    made.add_argument("--context", type=_natural, default=600, help="maximum number of characters before the name "
                      "(%(default)s: about 127 tokens)")  # fmt: skip
    made.add_argument(
        "--per_class", type=_natural, default=3000, help="maximum number of people of a class (%(default)s)"
    )
    made.add_argument(
        "--min_per_class", type=_natural, default=20, help="exclude classes with fewer people (%(default)s)"
    )
    made.add_argument(
        "--per_name", type=_natural, default=1, help="maximum number of mentions of a person (%(default)s)"
    )
    made.add_argument("--seed", type=int, default=0, help="seed of the draw of mentions (%(default)s)")
    made.add_argument("--overwrite", action="store_true", help="replace an existing file")
    made.add_argument("--quiet", action="store_true", help="print no progress bars and no table, only warnings")
    return made


def _natural(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def build(args: argparse.Namespace) -> None:
    """Read the dump and the texts, and write the file.

    Raises `RequestError` if the request is invalid, or no person is found.
    """
    output.check_output(args.output, args.overwrite)
    dump.check_dump(args.dump)
    files = texts.text_files(args.texts)
    names = read_people(args.dump, args.quiet)
    finder = mentions.MentionFinder(names, args.context, args.per_name, args.seed)
    search_texts(files, finder, args.quiet)
    rows, counts = selection.select(names, finder.found, args.min_per_class, args.per_class)
    if not rows:
        raise RequestError(
            f"{args.texts}: mentions {len(finder.found)} of {len(names.hashes)} names, and of no task "
            f"{args.min_per_class} people of two classes: give more texts, or more of the dump"
        )
    left_out = [f"{count.task} {count.name} ({count.found} found)" for count in counts if not count.rows]
    if left_out:
        log.warning("excluded, because there are too few people or only one class: %s", ", ".join(left_out))
    output.write(args.output, rows)
    if not args.quiet:
        show(
            "\n".join(
                f"{n.task:10}  {n.name:16}  {n.found:7} found  {n.people:6} people  {n.rows:6} rows" for n in counts
            )
        )


def read_people(path: str, quiet: bool) -> Names:
    """Return all people of the dump whose name can be searched for. Raises `RequestError` if there are none."""
    table, tally = PeopleTable(), dump.Tally()
    with _bar("dump", [] if path == dump.STDIN else [Path(path)], quiet) as bar:
        for entity in dump.entities(path, tally, bar.update):
            try:
                person = entities.person_of(entity)
                parents = entities.items_of(entity, classes.SUBCLASS_OF)
                item = entities.item_number(entity) if parents else None
            except (KeyError, TypeError, ValueError, AttributeError):  # JSON, but not an entity
                tally.malformed += 1
                continue
            if person is not None:
                table.add(person)
            if item is not None:
                table.add_subclass(item, parents)
            bar.set_postfix_str(f"{len(table)} people", refresh=False)
    if tally.malformed:
        log.warning("%s: skipped %d of %d lines, which are not entities", path, tally.malformed, tally.lines)
    if tally.ends_early:
        log.warning("%s: the file is truncated after %d lines: using these", path, tally.lines)
    if not len(table):
        raise RequestError(
            f"{path}: {tally.lines} lines and no person: is it Wikidata's JSON dump, with an entity on each line?"
        )
    if not table.knows_subclasses:
        log.warning("%s: it has no subclass of athlete: only people of the five sports count as athletes", path)
    return table.names()


def search_texts(files: list[Path], finder: mentions.MentionFinder, quiet: bool) -> None:
    """Search all texts with the finder."""
    tally = texts.TextTally()
    with _bar("texts", files, quiet) as bar:
        for text in texts.texts(files, tally, bar.update):
            finder.search(text)
            bar.set_postfix_str(f"{len(finder.found)} people", refresh=False)
    if tally.malformed:
        log.warning("skipped %d lines of the texts, which are not objects with a text", tally.malformed)


@contextmanager
def _bar(name: str, files: Sequence[Path], quiet: bool) -> Iterator[tqdm]:
    """Open a progress bar that counts the bytes of the files as they are, so that compressed files end at 100 %."""
    size = sum(path.stat().st_size for path in files) or None
    with tqdm(total=size, desc=name, unit="B", unit_scale=True, disable=quiet, mininterval=1.0) as bar:
        yield bar


def main(argv: Sequence[str] | None = None) -> int:
    """Build the file, report an error in one line on stderr, and return the exit code."""
    to_stderr = logging.StreamHandler()
    to_stderr.setFormatter(LineFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[to_stderr])
    args = parser().parse_args(argv)
    try:
        with as_keyboard_interrupt():
            build(args)
    except RequestError as error:
        show_on_stderr(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        show_on_stderr("interrupted: nothing was written")
        return 130
    except (OSError, MemoryError) as error:
        show_on_stderr(f"failed: {type(error).__name__}: {error}; nothing was written")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
