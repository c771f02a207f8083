"""A server on ``ForgeryDetector``: a page for people, an API for programs."""
