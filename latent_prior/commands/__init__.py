"""The commands of stage two, one file each."""
