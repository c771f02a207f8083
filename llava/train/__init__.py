"""Training: from records to a checkpoint."""
