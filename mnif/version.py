"""The version of the project; it stands alone so that any module can import it without the package's public names."""

__version__ = "0.1.0"
