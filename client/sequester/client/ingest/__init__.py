"""Run by the operator: files to a frozen cohort store. No consortium key, no exchange."""
