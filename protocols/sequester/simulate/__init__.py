"""Made-up hospitals for the demo, rehearsals, audits and tests: simulated genomes, simulated patients, a known truth."""
