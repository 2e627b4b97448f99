"""SAE Lens: folders, releases, architectures and names of hook points."""
