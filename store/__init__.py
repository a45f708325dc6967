"""The feature store, the scan catalogue, label tables, splits, provenance and verification."""
