"""Caches on disk that runs on the same model share: activations, fits of the model view, model facts and tokens."""
