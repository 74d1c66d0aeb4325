"""Export a selection of an episode store to other formats."""
