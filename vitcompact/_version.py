"""The version of the package, which pyproject.toml and `vc.__version__` read."""
__version__ = "0.2.0.dev0"
