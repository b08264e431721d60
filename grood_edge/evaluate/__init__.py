"""How well ID and OOD are told apart."""
