"""Training of SAEs of any model on any folder of text; start it with `scripts/train_saes.py`."""
