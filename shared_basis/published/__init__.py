"""`python -m shared_basis.published`, as an earlier version had it; its code is `studies/published.py`."""
