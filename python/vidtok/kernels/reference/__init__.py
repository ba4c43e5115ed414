"""Plain torch: readable, the oracle of the tests, and what serves where no kernel can."""
