"""Genotype files, one reader for each format, and the match of their rows to the variants of a study."""
