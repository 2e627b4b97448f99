#!/usr/bin/env python3
"""Describe an SAE, and find where in a model it fits.

python sae_loader.py assets/tiny-pythia-saes-k8                        # print what its files say
python sae_loader.py assets/tiny-pythia-saes-k8 --model_name assets/tiny-pythia --layers 3
"""

if __name__ == "__main__":
    from delta_selectivity.cli.program import start

    start("inspect")
