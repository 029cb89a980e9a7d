"""What every package needs and no signal or model is part of: errors, files, flags, processes, pixels, meshes."""

__version__ = "0.1.0"
"""Of the project; here, where every module may import it without the public names of :mod:`mnif`."""
