"""Published algorithms in eager torch, written from their formulas, and what a careful user would write instead."""
