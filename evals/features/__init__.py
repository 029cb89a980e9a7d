"""Feature extractors by name: networks that turn pictures into vectors, their weights, the resizing before them."""
