"""Networks that turn pictures into features, the published weights they need, and the resizing before them."""
