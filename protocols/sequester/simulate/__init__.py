"""Made-up hospitals for the demo, rehearsals, audits and tests; never imported by a gate or an exchange."""
