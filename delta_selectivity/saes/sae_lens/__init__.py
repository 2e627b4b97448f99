"""SAE Lens: its folders, its list of releases, its architectures and its names for places."""
