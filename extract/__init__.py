"""Stage one: from scans to per-slice embeddings in a feature store."""
