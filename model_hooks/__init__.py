"""Behind `language_model`: places in a decoder by name, what flows there, its width, and whether it is what it says."""
