"""Measured runs compared: `python -m report`."""
