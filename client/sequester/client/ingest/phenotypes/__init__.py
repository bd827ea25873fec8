"""Phenotypes and covariates: tables, OMOP and FHIR records, each to the same table of one row per patient."""
