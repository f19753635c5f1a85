"""MAFR, multi-modal attention-driven fusion restoration (arXiv 2510.21793)."""
