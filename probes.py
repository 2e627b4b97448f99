#!/usr/bin/env python3
"""Measure a file of rows, whoever wrote it (docs/rows_file.md).

python probes.py rows.safetensors -o results.json
"""

if __name__ == "__main__":
    from delta_selectivity.cli.program import start

    start("probe")
