"""A run's history, what is worth a word in it, its charts and its page."""
