"""The method: layers through shared filter bases."""
