"""What every package needs and no signal or model is part of: errors, files, flags, processes, pixels, meshes."""
