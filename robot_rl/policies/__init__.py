"""Base policies: the frozen, pretrained thing that succeeds sometimes."""
