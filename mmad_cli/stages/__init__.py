"""The five stages: the only code that knows store, datasets and methods together."""
