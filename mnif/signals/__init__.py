"""Signals: what an observation is, how fields are asked for it, and how what they show is written."""
