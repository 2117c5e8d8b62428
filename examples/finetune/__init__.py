"""A network with ImageNet weights, adapted to pictures of another kind inside a small budget."""
