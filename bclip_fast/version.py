"""The version of the package. setup.py reads it without importing the package, which would need torch."""

__version__ = "0.1.0"
