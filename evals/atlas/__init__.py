"""An atlas of a model's bases: what each does, and which of them make an instance what it is."""
