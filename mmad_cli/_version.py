"""The version, in one place: the build and the run records read it here."""

__version__ = "0.1.0"
