"""Language models of transformers as sources of activations at hook points."""
