"""Data sets: folders, files and built-in names become instances with ids, and a split that does not leak."""
