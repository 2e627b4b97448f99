"""Training of the bundled demo model and its SAEs; start it with `scripts/train_demo.py`."""
