"""Stage two: MoLRE heads on cached embeddings, their fitting and their evaluation."""
