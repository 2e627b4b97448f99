#!/usr/bin/env python3
"""Write activations, reconstructions, labels and groups of the probed rows to one file (docs/rows_file.md).

python activations.py --layers 3 --datasets gender -o rows.safetensors
"""

if __name__ == "__main__":
    from delta_selectivity.cli.program import start

    start("extract")
