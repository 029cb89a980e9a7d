"""The commands of stage one, one file each: its flags, what they may not be, and what it does."""
