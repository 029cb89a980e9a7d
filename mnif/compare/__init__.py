"""The ways of learning side by side at equal compute: `mnif compare-fit`."""
