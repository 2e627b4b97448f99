"""The SAE Lens format: folders, releases, architectures and names of hook points."""
