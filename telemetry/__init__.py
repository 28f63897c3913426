"""Logs, metrics, and what is measured of a running server."""
