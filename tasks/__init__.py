"""What is asked of the model: texts, labels, people and token positions. The door is `datasets_wikidata`."""
