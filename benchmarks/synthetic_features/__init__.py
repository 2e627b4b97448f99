"""A world whose features are known, SAEs of it from perfect to broken, and what each of them keeps of the features."""
