"""The channel analysis: facts forward, liveness backward, keep by closure, and one rewrite. No PyTorch in here."""
