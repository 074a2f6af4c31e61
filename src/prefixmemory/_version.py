"""The version of the package, which saved adapters name."""

__version__ = "0.1.0"
