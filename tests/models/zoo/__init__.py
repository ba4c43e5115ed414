"""Tiny random configs of the families that the hooks support, one file per family."""
