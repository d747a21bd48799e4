"""A local stand-in for the Hub."""

from .server import Hub

__all__ = ["Hub"]
