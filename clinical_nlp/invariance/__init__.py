"""What training may ask of a representation, so that the institution is harder to read in it."""

OBJECTIVES = {
    "erm": "nothing beyond the task: every note counts the same; the baseline that the others are compared with",
}
"""Objective -> what it is for."""
