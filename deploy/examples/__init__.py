"""Real genomes and real doses through the real processes, compared with other programs on everybody's data."""
