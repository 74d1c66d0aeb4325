"""Policies on another computer: a server of our own that batches robots, its client, and clients of other servers."""
