"""Training of the built-in backbones on data that is generated on the fly; nothing outside this package is read."""
