"""Rows of preferences and of SFT: where they come from, their forms, and the packed arrays on disk."""
