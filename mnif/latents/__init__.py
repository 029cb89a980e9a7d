"""Latents: as a file, as learned parameters, found for new data, and the linear code they are held against."""
