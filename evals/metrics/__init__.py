"""Measures of sets of instances, each from arrays alone: distances, precision and recall, novelty, reconstruction."""
