"""The live page: runs as they go, on this machine only. Needs the extra `ui`."""

from penchant.dash.server import serve

__all__ = ["serve"]
