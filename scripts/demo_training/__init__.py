"""How the bundled demo model and its SAEs were made; `scripts/train_demo.py` is the door."""
