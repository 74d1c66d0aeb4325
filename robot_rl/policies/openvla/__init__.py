"""OpenVLA checkpoints as base policies: a language model that writes actions as tokens, without a line of the checkpoint's own code."""
