"""Building of a dataset of people from a Wikidata dump and texts; start it with `scripts/build_wikidata.py`."""
