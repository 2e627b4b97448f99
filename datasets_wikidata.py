#!/usr/bin/env python3
"""List the tasks with their rows, groups and class balance, or write the rows of tasks to a file.

python datasets_wikidata.py
python datasets_wikidata.py --datasets gender --export gender.csv      # `--dataset_file gender.csv` reads it
"""

if __name__ == "__main__":
    from delta_selectivity.cli.program import start

    start("tasks")
