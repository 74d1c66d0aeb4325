"""Learners: critic ensembles and the losses that train a head."""
