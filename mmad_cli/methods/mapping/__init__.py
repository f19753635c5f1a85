"""What CFM, MAFR and CMDR-IAD share: dense features, one trainer, smoothing and per-metric scaling."""
