"""Does a sparse autoencoder keep what a language model knows? Probes on activations and on their reconstruction."""
