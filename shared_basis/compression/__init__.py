"""Compression of a trained plain network to one with shared bases."""
