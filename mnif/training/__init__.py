"""Learning: the loop both stages share, its checkpoints and records, and the three ways of learning bases."""
