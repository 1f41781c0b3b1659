"""The noise of a score, what a score depends on, stored reference scores, and the losses made of scores."""
