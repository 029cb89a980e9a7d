"""How runs are compared: trained at equal compute, measured alike, chosen from, and shown as people read it."""
