"""What `mnif compare-fit` measures of each way of learning beside its quality, and how people read it."""
