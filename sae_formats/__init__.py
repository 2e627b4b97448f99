"""The rooms behind ``sae_loader``: one idea a file.

``sparse_rows`` and ``sae`` are the types that leave this folder, ``source`` is what a name resolves to, ``names`` what
several may be typed as. ``folders``, ``hub``, ``sae_lens_registry`` and ``registered`` are where SAEs are found;
``sparsify``, ``sae_lens``, ``dictionary_learning`` and ``plain`` read the formats. ``hookpoints`` and
``transformer_lens_weights`` know where in a model an SAE belongs and what was done to that model.
"""
