"""Learning: the contrastive loss, optimizers and learning rates. Knows neither data nor Ray."""
