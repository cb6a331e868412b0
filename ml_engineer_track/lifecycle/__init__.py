"""The loop: what the product got wrong becomes the next model, or a reason why not."""
