"""What training may ask of a representation, so that the institution is harder to read in it."""

OBJECTIVES = {
    "erm": "nothing beyond the task: every note counts the same; the baseline that the others are compared with",
}
"""Objective -> what it is for."""

ERASERS = {
    "leace": "the smallest linear change after which no linear probe gains; needs no institution later",
    "mean_centring": "every institution's mean moved to the common one; needs the institution of each note later",
    "inlp": "the directions of one linear classifier after another projected out; takes more than leace",
}
"""Eraser -> what it does; see `clinical_nlp.invariance.erasers`."""
