"""How good it is: distances between sets of pictures, reconstruction, memorisation, and the controls beside them."""
