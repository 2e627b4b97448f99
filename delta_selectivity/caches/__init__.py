"""What runs on the same model share by way of the disk: activations, fits of the model view, its setup."""
