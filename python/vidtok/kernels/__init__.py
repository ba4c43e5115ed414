"""Backends behind the operators, and the choice among them."""
