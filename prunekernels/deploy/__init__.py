"""A small network as files that need neither its class nor, but for load_small, this package."""
