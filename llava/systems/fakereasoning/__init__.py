"""FakeReasoning (arXiv 2503.21210)."""
