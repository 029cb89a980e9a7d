"""The commands that measure a model and show a run, one file each."""
