"""G2SF: geometry-guided fusion of the scores of two memory banks (arXiv 2503.10091)."""
