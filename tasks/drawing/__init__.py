"""The embedded data set: scenes drawn from a seed, their captions, and the small tower trained on such scenes."""
