"""Views: what may happen to an image, what happens to this one, and doing it."""
