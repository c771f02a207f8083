"""The published MMFR-Dataset: fetching its parts and unpacking them."""
