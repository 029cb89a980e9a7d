"""How the built-in furniture sets are made; run by ``scripts/make_furniture.py``."""
