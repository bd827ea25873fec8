"""Patients are here: readers, cohorts, contributions. No keys, no network."""
