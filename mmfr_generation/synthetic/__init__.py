"""A rendered forgery benchmark whose labels, explanations and masks are true by construction."""
