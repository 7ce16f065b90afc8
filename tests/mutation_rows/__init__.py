"""The tables of `mutations.py`, in the order in which they are judged."""

from mutation_rows import learning, running, using
from mutation_rows.mutation import Mutation

__all__ = ["MUTATIONS", "Mutation"]

MUTATIONS = (*learning.MUTATIONS, *running.MUTATIONS, *using.MUTATIONS)
