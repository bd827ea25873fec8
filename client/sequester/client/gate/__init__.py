"""Keys and the way out are here: policy, approvals, ledger, noise, masks. No genotype is readable from this package."""
