"""The rooms behind ``sae_loader``: one idea a file.

``sparse_rows`` and ``sae`` are the types that leave this folder, ``source`` is what a name resolves to,
``sparsify`` and ``sae_lens`` read the two formats, ``hub`` finds the folder that a name means.
"""
