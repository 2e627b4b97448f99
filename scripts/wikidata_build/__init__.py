"""How a Wikidata dump and a folder of texts become a dataset of people; `scripts/build_wikidata.py` is the door."""
