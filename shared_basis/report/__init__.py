"""Reports: what a run was, did and got wrong, as one page with pictures; and several runs compared."""
