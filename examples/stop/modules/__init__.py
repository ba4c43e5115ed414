"""The module names of the published code."""
