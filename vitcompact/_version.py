"""The version of the package: pyproject.toml reads it here, and so does `vc.__version__`."""
__version__ = "0.2.0.dev0"
