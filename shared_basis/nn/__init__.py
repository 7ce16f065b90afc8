"""The method: layers with shared filter bases."""
