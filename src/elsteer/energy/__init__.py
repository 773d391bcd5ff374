"""Energies of hidden states: the models, their descent in closed form, and their training."""
