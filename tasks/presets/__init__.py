"""The built-in presets, one file each."""
