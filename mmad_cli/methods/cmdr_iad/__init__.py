"""CMDR-IAD (arXiv 2603.03939): cross-modal mapping and a reconstruction decoder per modality."""
