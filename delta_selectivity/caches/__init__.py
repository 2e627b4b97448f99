"""On-disk caches shared by runs on the same model: activations, probe fits, model facts and tokens."""
