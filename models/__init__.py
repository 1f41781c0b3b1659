"""Architectures and families of models: find, load, adapt and save them, with their tokenizers."""
