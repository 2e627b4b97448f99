#!/usr/bin/env python3
"""Compute the metric for a file of activations and reconstructions from any source (docs/rows_file.md).

python probes.py rows.safetensors -o results.json
"""

if __name__ == "__main__":
    from delta_selectivity.cli.program import start

    start("probe")
