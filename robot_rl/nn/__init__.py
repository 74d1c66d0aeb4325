"""Small networks in flat buffers, with hand-written gradients: the parts that heads and critics are made of."""
