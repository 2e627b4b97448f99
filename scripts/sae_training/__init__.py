"""Trains SAEs of any model on any folder of text (`scripts/train_saes.py`)."""
