"""The networks and their building blocks."""

from shared_basis.models.base import Network, Sharing
from shared_basis.models.registry import GRAMMAR, create_model, family_of, plain_counterpart

__all__ = ["GRAMMAR", "Network", "Sharing", "create_model", "family_of", "plain_counterpart"]
