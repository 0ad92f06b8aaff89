"""Trivium: a laboratory for language models that reason from few tokens."""

__version__ = "0.1.0"
