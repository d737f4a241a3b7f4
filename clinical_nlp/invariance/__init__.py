"""What training may ask of a representation, so that the institution is harder to read in it."""

OBJECTIVES = {
    "erm": "nothing beyond the task: every note counts the same; the baseline that the others are compared with",
    "dann": "a discriminator reads the institution from the representation, which learns to be no help to it (reversed "
    "gradient); aligns all notes alike, so equal prevalences are best, or conditional",
    "cdan": "dann that sees the representation together with the model's own predictions; for prevalences that differ, "
    "and for notes without gold",
    "mmd": "kernel distance between institutions in each batch; no second network, wants large batches",
    "coral": "distance of means and covariances between institutions; as mmd, cheaper and sees less",
    "irm": "one head that is best for every institution at once (IRMv1); needs associations that differ in strength "
    "between training institutions",
    "vrex": "equal risks in all institutions; as irm, steadier",
    "group_dro": "the institution with the highest risk counts most; for the worst institution, not for unseen ones",
    "mcd": "two more heads that disagree on notes without gold (objective.target) as far as the gold allows, and a "
    "representation that leaves them no room",
    "self_training": "what the model is surest of in notes without gold (objective.target), a share of each label, is "
    "learned as gold; for a model that is right there more often than not",
}
"""Objective -> what it is for. adda and test-time adaptation (tent) are in the suite cross_institution."""

ERASERS = {
    "leace": "the smallest linear change after which no linear probe gains; needs no institution later",
    "mean_centring": "every institution's mean moved to the common one; needs the institution of each note later",
    "inlp": "the directions of one linear classifier after another projected out; takes more than leace",
}
"""Eraser -> what it does; see `clinical_nlp.invariance.erasers`."""
