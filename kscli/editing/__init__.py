"""Edits of a model by the closed form: predicted, made, and measured."""
