"""HTML pages that need no other file; every text that comes from outside is escaped."""
