"""Scores from released sums and a public reference of linkage: post-processing at the coordinator, no patient, no round."""
