"""Chat API: requests in batches or directly, and their answers on disk."""
