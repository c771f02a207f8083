"""Training data: conversations to ids, labels and batches."""
