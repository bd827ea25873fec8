"""The consortium: rounds, secure sums, studies, reports. Sees opened sums and nothing else."""
