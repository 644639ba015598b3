"""Models under test: backbones, the tower view, the shared attention and the heads."""
