"""M3DM, "Multimodal Industrial Anomaly Detection via Hybrid Fusion" (CVPR 2023, arXiv 2303.00601)."""
