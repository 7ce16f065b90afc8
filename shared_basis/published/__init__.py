"""`python -m shared_basis.published`, deprecated; moved to `studies/published.py`."""
