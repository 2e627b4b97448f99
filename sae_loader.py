#!/usr/bin/env python3
"""Print what an SAE is, and where in a model it fits.

python sae_loader.py assets/tiny-pythia-saes-k8                        # what its files say
python sae_loader.py assets/tiny-pythia-saes-k8 --model_name assets/tiny-pythia --layers 3
"""

if __name__ == "__main__":
    from delta_selectivity.cli.program import start

    start("inspect")
