"""The built-in tasks, one file each; code that they share lies in sub-packages."""
