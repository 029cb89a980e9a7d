"""The commands that make a bundle and look into it, one file each."""
